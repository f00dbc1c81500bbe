"""`loratools formats`."""

from __future__ import annotations

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import print_json, print_table
from loratools.work.requests import Reporting
from loratools_formats import FormatEntry, registered_formats


@named_command("formats")
@shared.reports()
def command(reporting: Reporting) -> None:
    """List the adapter formats, broken plugins included.

    \b
    loratools formats
    """  # noqa: D301 - click reads the backspace
    entries = registered_formats()
    if reporting.json:
        print_json({"operation": "formats", "formats": [_as_json(entry) for entry in entries]})
    if reporting.json or reporting.quiet:
        return
    print_table(
        ["name", "can", "package", "description"],
        "<<<<",
        [[entry.name, _abilities(entry), entry.package, _description(entry)] for entry in entries],
    )


def _abilities(entry: FormatEntry) -> str:
    if entry.format is None:
        return "broken"
    halves = [("read", entry.format.read), ("write", entry.format.write)]
    return "+".join(name for name, half in halves if half is not None)


def _description(entry: FormatEntry) -> str:
    return entry.error or "" if entry.format is None else entry.format.description


def _as_json(entry: FormatEntry) -> dict[str, object]:
    return {
        "name": entry.name,
        "package": entry.package,
        "broken": entry.format is None,
        "error": entry.error,
        "read": entry.format is not None and entry.format.read is not None,
        "write": entry.format is not None and entry.format.write is not None,
        "description": None if entry.format is None else entry.format.description,
    }
