"""`loratools formats`."""

from __future__ import annotations

import click

from loratools.cli import options as shared
from loratools.cli.output import print_json, print_table
from loratools_formats import FormatEntry, registered_formats


@click.command("formats")
@shared.json_option
def command(as_json: bool) -> None:
    """List the adapter formats, broken plugins included."""
    entries = registered_formats()
    if as_json:
        print_json({"operation": "formats", "formats": [_as_json(entry) for entry in entries]})
        return
    print_table(
        ["name", "can", "package", "description"],
        "<<<<",
        [[entry.name, _abilities(entry), entry.package, _description(entry)] for entry in entries],
    )


def _abilities(entry: FormatEntry) -> str:
    if entry.format is None:
        return "broken"
    halves = [("read", entry.format.is_readable), ("write", entry.format.is_writable)]
    return "+".join(name for name, can in halves if can)


def _description(entry: FormatEntry) -> str:
    return entry.error or "" if entry.format is None else entry.format.description


def _as_json(entry: FormatEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "package": entry.package,
        "broken": entry.format is None,
        "error": entry.error,
        "read": entry.format is not None and entry.format.is_readable,
        "write": entry.format is not None and entry.format.is_writable,
        "description": None if entry.format is None else entry.format.description,
    }
