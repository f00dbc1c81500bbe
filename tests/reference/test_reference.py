"""The reference in the documentation is what the code says."""

import json
from pathlib import Path

import make_reference
import pytest

import loratools as lt
from loratools.cli import exits

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"


def test_the_pages_are_up_to_date():
    written = {path.name: path.read_text() for path in make_reference.FOLDER.glob("*.md")}
    assert written == make_reference.pages(), "run tests/reference/make_reference.py"


def test_every_public_function_and_every_schema_has_its_part():
    python = (make_reference.FOLDER / "python.md").read_text()
    functions = [name for name in lt.__all__ if callable(getattr(lt, name)) and name[0].islower()]
    assert all(f"## lt.{name}\n" in python for name in functions)
    objects = (make_reference.FOLDER / "json.md").read_text()
    for path in make_reference.SCHEMAS.glob("*.json"):
        assert path.stem in ("error", "recipe") or f"## {path.stem}\n" in objects


def test_every_exit_code_of_the_program_is_in_the_table():
    codes = {v for k, v in vars(exits).items() if k.startswith("EXIT_") and k != "EXIT_SIGNAL"}
    assert {str(code) for code in codes} <= set(exits.MEANINGS)


@pytest.mark.parametrize("make", ["squeeze", "merge", "fuse", "squeeze of a merge in memory"])
def test_every_key_of_a_statement_is_described(make, tmp_path):
    out = tmp_path / "out"
    if make == "squeeze":
        lt.squeeze(LLAMA / "lora", rank=4, output=out)
    elif make == "merge":
        first = lt.squeeze(LLAMA / "lora", rank=4, output=tmp_path / "first").adapter
        assert first is not None
        lt.merge([tmp_path / "first", LLAMA / "rslora"], rank=4, output=out)
    elif make == "fuse":
        lt.fuse(LLAMA / "model", LLAMA / "lora", output=out)
    else:
        both = lt.merge([LLAMA / "lora", LLAMA / "rslora"], rank=4)
        lt.squeeze(both.adapter, rank=2, output=out)
    statement = json.loads((out / "provenance.json").read_text())
    assert keys(statement) <= set(make_reference.STATEMENT)


FREE = {  # whose keys are names of options, parameters, packages or steps
    "predicate.options", "predicate.environment", "predicate.report", "predicate.steps",
    "predicate.history", "predicate.call.arguments", "predicate.call.options", "subject.digest",
    "predicate.inputs.digest",
}  # fmt: skip


def keys(value, prefix=""):
    """Return the dotted keys of a statement."""
    found = set()
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict):
            for key, inner in one.items():
                name = f"{prefix}{key}"
                if name != "predicate":
                    found.add(name)
                if name not in FREE:
                    found |= keys(inner, f"{name}.")
    return found
