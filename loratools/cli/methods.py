"""`loratools methods`."""

from __future__ import annotations

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import print_table
from loratools.cli.perform import report
from loratools.face.lists import MethodInfo, MethodsResult, methods
from loratools.work.requests import Reporting


@named_command("methods")
@shared.reports()
def command(reporting: Reporting) -> None:
    """List the merge methods with their parameters, broken plugins included.

    \b
    loratools methods
    """  # noqa: D301 - click reads the backspace
    report(methods(), _show, reporting)


def _show(result: MethodsResult) -> None:
    print_table(
        ["method", "class", "parameters", "source", "what it does"],
        "<<<<<",
        [_row(entry) for entry in result.methods],
    )


def _row(entry: MethodInfo) -> list[str]:
    if entry.broken:
        return [entry.name, "broken", "", entry.package, entry.error or ""]
    parameters = ", ".join(f"{name}={default}" for name, default in entry.parameters.items())
    return [entry.name, entry.kind or "", parameters, entry.paper or "", entry.summary or ""]
