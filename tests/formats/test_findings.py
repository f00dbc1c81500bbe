"""Every finding has a code of the table, and every code of the table is somebody's."""

import ast
from pathlib import Path

import pytest

import loratools
import loratools_formats
from loratools_formats import Adapter, Finding
from loratools_formats.core.findings import CODES
from loratools_formats.disk.errors import UnsupportedError

ROOTS = [Path(package.__file__).parent for package in (loratools, loratools_formats)]


def constructed():
    """Return (file, code) of every finding that the code base makes; the code None if computed."""
    found = []
    for path in (path for root in ROOTS for path in root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                code = node.args[0] if node.args else None
                found.append((path, code.value if isinstance(code, ast.Constant) else None))
    return found


@pytest.mark.slow
def test_every_finding_has_a_code_of_the_table():
    unlisted = [(path.name, code) for path, code in constructed() if code not in CODES]
    assert unlisted == []


@pytest.mark.slow
def test_every_code_of_the_table_is_of_some_finding():
    assert set(CODES) == {code for _, code in constructed()}


def test_codes_are_kebab_case_words():
    assert all(code == code.lower() and "_" not in code and " " not in code for code in CODES)


def finding(severity, code="mutated-base"):
    return Finding(code, severity, None, f"what is the matter with {code}", "what to do")


def test_only_errors_hinder_operations():
    remarks = (finding("warning"), finding("note"))
    adapter = Adapter("peft", None, {}, findings=remarks)
    adapter.require_true_delta("squeeze")
    assert adapter.caveats == ()
    assert adapter.remarks == tuple(each.message for each in remarks)
    hindered = Adapter("peft", None, {}, findings=(*remarks, finding("error")))
    with pytest.raises(UnsupportedError, match=r"squeeze needs .*mutated-base.*what to do"):
        hindered.require_true_delta("squeeze")
    hindered.require_true_delta("convert", kept=("mutated-base",))


def test_the_first_finding_that_is_not_kept_is_named():
    adapter = Adapter("x", None, {}, findings=(finding("error", "one"), finding("error", "two")))
    with pytest.raises(UnsupportedError, match="matter with two"):
        adapter.require_true_delta("convert", kept=("one",))
