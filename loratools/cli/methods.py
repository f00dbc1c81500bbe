"""`loratools methods`."""

from __future__ import annotations

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.completion import method_completions
from loratools.cli.output import print_table, say
from loratools.cli.perform import report
from loratools.cli.table import wrapped
from loratools.face.lists import MethodInfo, MethodsResult, methods
from loratools.work.requests import Reporting


@named_command("methods")
@click.argument("name", metavar="[METHOD]", required=False, shell_complete=method_completions)
@shared.reports()
def command(name: str | None, reporting: Reporting) -> None:
    """List the merge methods with their parameters, broken plugins included.

    With a METHOD, explain that one.

    \b
    loratools methods
    loratools methods ties
    """  # noqa: D301 - click reads the backspace
    report(methods(name), _show if name is None else _explain, reporting)


def _show(result: MethodsResult) -> None:
    print_table(
        ["method", "class", "parameters", "source", "what it does"],
        "<<<<<",
        [_row(entry) for entry in result.methods],
    )


def _row(entry: MethodInfo) -> list[str]:
    if entry.broken:
        return [entry.name, "broken", "", entry.package, entry.error or ""]
    return [entry.name, entry.kind or "", _parameters(entry), entry.paper or "", _summary(entry)]


def _explain(result: MethodsResult) -> None:
    for entry in result.methods:
        changed = "; change one with --set KEY=VALUE" if entry.parameters else ""
        say(f"{entry.name} ({entry.kind})")
        say()
        say(wrapped(_summary(entry)))
        say()
        say(wrapped(f"parameters  {_parameters(entry) or 'none'}{changed}", " " * 12))
        say(wrapped(f"source      {entry.paper or entry.package}", " " * 12))
        say(f"use         loratools merge ADAPTERS -o MERGED --method {entry.name}")


def _parameters(entry: MethodInfo) -> str:
    return ", ".join(f"{name}={default}" for name, default in entry.parameters.items())


def _summary(entry: MethodInfo) -> str:
    return entry.summary or ""
