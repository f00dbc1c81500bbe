"""Findings as JUnit XML: a test suite for each adapter, and a failed case for each finding.

Errors and warnings are failures; notes are cases that passed, with the note as their output.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from loratools.cli.findings.places import file_of
from loratools.face.check import CheckResult
from loratools.operations.check.outcome import CheckFinding
from loratools_formats.disk.errors import printable


def junit_of(result: CheckResult) -> str:
    """Return the XML."""
    root = ET.Element("testsuites", name="loratools check")
    for adapter in result.adapters:
        found = [f for f in result.findings if f.adapter == adapter.adapter]
        suite = _suite(root, adapter.adapter, len(found) or 1)
        suite.set("failures", str(sum(f.severity != "note" for f in found)))
        for finding in found:
            _case(suite, finding)
        if not found:
            ET.SubElement(suite, "testcase", classname="loratools", name="all rules")
    for unchecked in result.unchecked:
        suite = _suite(root, unchecked.adapter, 1)
        suite.set("errors", "1")
        case = ET.SubElement(suite, "testcase", classname="loratools", name="read")
        ET.SubElement(case, "error", message=printable(unchecked.reason, 1000))
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ET.indent(root)
    text: str = ET.tostring(root, encoding="unicode", xml_declaration=True)
    return text


def _suite(root: ET.Element, name: str, tests: int) -> ET.Element:
    return ET.SubElement(
        root, "testsuite", name=printable(name, 400), tests=str(tests), failures="0", errors="0"
    )


def _case(suite: ET.Element, finding: CheckFinding) -> None:
    parts = [f"{finding.code} {finding.rule}", finding.target, finding.where]
    name = printable(" ".join(part for part in parts if part), 400)
    case = ET.SubElement(
        suite,
        "testcase",
        classname=f"loratools.{finding.rule}",
        name=name,
        file=printable(file_of(finding), 400),
        line=str(finding.line or 1),
    )
    message = printable(finding.message, 2000)
    if finding.severity == "note":
        ET.SubElement(case, "system-out").text = message
        return
    failure = ET.SubElement(case, "failure", message=message, type=finding.severity)
    failure.text = printable(finding.command or finding.hint, 1000)
