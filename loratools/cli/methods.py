"""`loratools methods`."""

from __future__ import annotations

import click

from loratools.cli import options as shared
from loratools.cli.output import print_json, print_table
from loratools.operations.merge.methods import MethodEntry, registered_methods


@click.command("methods")
@shared.json_option
def command(as_json: bool) -> None:
    """List the merge methods with their parameters, broken plugins included."""
    entries = registered_methods()
    if as_json:
        print_json({"operation": "methods", "methods": [_as_json(entry) for entry in entries]})
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
