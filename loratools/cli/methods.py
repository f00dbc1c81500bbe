"""`loratools methods`."""

from __future__ import annotations

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import print_json, print_table
from loratools.operations.merge.methods import MethodEntry, registered_methods
from loratools.work.requests import Reporting


@named_command("methods")
@shared.reports()
def command(reporting: Reporting) -> None:
    """List the merge methods with their parameters, broken plugins included.

    \b
    loratools methods
    """  # noqa: D301 - click reads the backspace
    entries = registered_methods()
    if reporting.json:
        print_json({"operation": "methods", "methods": [_as_json(entry) for entry in entries]})
    if reporting.json or reporting.quiet:
        return
    print_table(
        ["method", "class", "parameters", "source", "what it does"],
        "<<<<<",
        [_row(entry) for entry in entries],
    )


def _row(entry: MethodEntry) -> list[str]:
    method = entry.method
    if method is None:
        return [entry.name, "broken", "", entry.package, entry.error or ""]
    parameters = ", ".join(
        f"{name.rstrip('_')}={default}" for name, default in method.parameters.items()
    )
    return [entry.name, method.kind, parameters, method.paper, method.summary]


def _as_json(entry: MethodEntry) -> dict[str, object]:
    method = entry.method
    return {
        "name": entry.name,
        "package": entry.package,
        "broken": method is None,
        "error": entry.error,
        "class": None if method is None else method.kind,
        "paper": None if method is None else method.paper,
        "summary": None if method is None else method.summary,
        "parameters": {}
        if method is None
        else {name.rstrip("_"): default for name, default in method.parameters.items()},
    }
