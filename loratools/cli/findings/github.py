"""Findings as annotations of GitHub Actions: workflow commands, one for each.

Source: GitHub docs, workflow commands for GitHub Actions. A step shows ten errors and ten warnings.
"""

from __future__ import annotations

from loratools.cli.findings.places import file_of
from loratools.cli.findings.text import summary
from loratools.face.check import CheckResult
from loratools_formats.disk.errors import printable

_LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def github_of(result: CheckResult) -> str:
    """Return one command for each finding, and one for each reference that was not checked."""
    lines = [
        _command(
            _LEVELS[finding.severity],
            (file_of(finding), finding.line or 1),
            f"{finding.code} {finding.rule}",
            f"{finding.message}. {finding.command or finding.hint}",
        )
        for finding in result.findings
    ]
    lines += [_command("error", (u.adapter, 1), "not checked", u.reason) for u in result.unchecked]
    lines.append(_command("notice", None, "loratools check", summary(result)))
    return "\n".join(lines)


def _command(level: str, place: tuple[str, int] | None, title: str, message: str) -> str:
    properties = {} if place is None else {"file": place[0], "line": str(place[1])}
    properties["title"] = title
    given = ",".join(f"{key}={_property(value)}" for key, value in properties.items())
    return f"::{level} {given}::{_data(printable(message, 2000))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text, 400)).replace(":", "%3A").replace(",", "%2C")
