"""Findings for people: a paragraph for each, grouped by adapter."""

from __future__ import annotations

from loratools.cli.output import number, quantity
from loratools.cli.table import wrapped
from loratools.cli.wording import worded
from loratools.face.check import CheckResult
from loratools.operations.check.outcome import CheckFinding
from loratools_formats.disk.errors import printable


def text_of(result: CheckResult) -> str:
    """Return the report."""
    lines: list[str] = []
    for step in result.steps:
        if step.taken:
            error = "" if step.relative_error is None else number(step.relative_error)
            lines.append(f"ran: {step.command} (relative error {error})")
        else:
            lines.append(f"did not run: {step.command}: {worded(printable(step.reason, 1000))}")
    for adapter in result.adapters:
        found = [f for f in result.findings if f.adapter == adapter.adapter]
        if found:
            lines.append(printable(adapter.adapter, 400))
            lines += [line for finding in found for line in _lines(finding)]
    lines += [
        f"{printable(u.adapter, 400)}: not checked: {printable(u.reason, 1000)}"
        for u in result.unchecked
    ]
    lines.append(summary(result))
    return "\n".join(lines)


def _lines(finding: CheckFinding) -> list[str]:
    place = "" if finding.line is None else f" ({printable(finding.file)}:{finding.line})"
    message = printable(finding.message, 1000)
    head = f"  {finding.severity} {finding.code} {finding.rule}{place}: {message}"
    fix = finding.command or finding.hint
    return [wrapped(head, " " * 4), wrapped(f"    fix: {worded(printable(fix, 1000))}", " " * 9)]


def summary(result: CheckResult) -> str:
    """Return one line: what ran, and how much was found."""
    counts = ", ".join(quantity(count, severity) for severity, count in result.counts.items())
    accepted = sum(adapter.accepted for adapter in result.adapters)
    text = (
        f"{quantity(len(result.adapters), 'adapter')} checked by "
        f"{quantity(len(result.rules), 'rule')}: {counts}"
    )
    text += f"; {quantity(accepted, 'finding')} in the baseline" if accepted else ""
    return f"{text}; {len(result.unchecked)} not checked" if result.unchecked else text
