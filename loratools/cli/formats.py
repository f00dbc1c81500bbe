"""`loratools formats`."""

from __future__ import annotations

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.completion import format_completions
from loratools.cli.output import print_table
from loratools.cli.perform import report
from loratools.face.lists import FormatInfo, FormatsResult, formats
from loratools.work.requests import Reporting


@named_command("formats")
@click.argument("name", metavar="[FORMAT]", required=False, shell_complete=format_completions)
@shared.reports()
def command(name: str | None, reporting: Reporting) -> None:
    """List the adapter formats, or one FORMAT, broken plugins included.

    \b
    loratools formats
    """  # noqa: D301 - click reads the backspace
    report(formats(name), _show, reporting)


def _show(result: FormatsResult) -> None:
    print_table(
        ["name", "can", "package", "description"],
        "<<<<",
        [
            [entry.name, _abilities(entry), entry.package, entry.description or entry.error or ""]
            for entry in result.formats
        ],
    )


def _abilities(entry: FormatInfo) -> str:
    if entry.broken:
        return "broken"
    return "+".join(name for name in ("read", "write") if getattr(entry, name))
