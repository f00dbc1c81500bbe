"""`loratools fleet add`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import number, print_table, say, sizes
from loratools.cli.perform import perform, target_of
from loratools.face.fleet_share import FleetAddResult, fleet_add
from loratools.operations.shared.adding import AddOptions
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Dropping
from loratools_formats.disk.errors import printable


@named_command("fleet add")
@click.argument("shelf", type=shared.PATH, metavar="SHARED")
@shared.adapter_argument
@shared.takes(AddOptions, into="options")
@shared.takes(Dropping, into="dropping")
@shared.takes(Workers, into="threads")
@shared.reads("from_", "carry_unknown", "ignore_key")
@shared.writes("max_error", positional=False)
@shared.reports("json", "quiet", "verbose")
def command(
    shelf: Path,
    adapter: Path,
    options: AddOptions,
    dropping: Dropping,
    threads: Workers,
    reading: Reading,
    writing: Writing,
    reporting: Reporting,
) -> int:
    """Add an adapter to a shared set, in the set's bases, and report its error.

    The input is not changed: the output is a set with one more adapter.

    \b
    loratools fleet add shared.safetensors new-adapter -o more.safetensors
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing)
    return perform(
        "fleet add",
        lambda progress: fleet_add(
            shelf,
            adapter,
            options=options,
            dropping=dropping,
            threads=threads,
            reading=reading,
            writing=target,
            progress=progress,
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
    )


def _show(result: FleetAddResult, *, verbose: bool) -> None:
    if verbose:
        print_table(
            ["module", "rank", "relative error"],
            "<>>",
            [
                [printable(one.name), str(one.rank), number(one.relative_error)]
                for one in result.modules
            ],
        )
    others = [
        f"{group}: {'lacks modules' if error is None else number(error)}"
        for group, error in enumerate(result.group_errors)
        if group != result.group
    ]
    say(f"{printable(result.name)} is in group {result.group}")
    if others:
        say(f"in other groups: {', '.join(others)}")
    say(f"relative error: {number(result.relative_error)}")
    say(f"size: {sizes(result.bytes_in, result.bytes_out)}")
