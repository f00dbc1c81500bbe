"""`loratools fleet unshare`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import human_bytes, number, print_table
from loratools.cli.perform import perform, target_of
from loratools.face.fleet_share import FleetUnshareResult, fleet_unshare
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.shared.taking import TakeOptions
from loratools.work.requests import Reporting, Writing
from loratools_formats.disk.errors import printable


@named_command("fleet unshare")
@click.argument("adapter", type=shared.PATH, metavar="SHARED")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@shared.takes(TakeOptions, "all", into="options")
@shared.takes(ComputeOptions, "dtype", "workers", into="compute")
@shared.writes(positional=False)
@shared.reports()
def command(
    adapter: Path,
    names: tuple[str, ...],
    options: TakeOptions,
    compute: ComputeOptions,
    writing: Writing,
    reporting: Reporting,
) -> int:
    """Take adapters out of a shared set, as plain PEFT LoRAs.

    -o names the folder of one adapter, or the folder in which each of several gets its own.

    \b
    loratools fleet unshare shared.safetensors chat -o chat
    loratools fleet unshare shared.safetensors --all -o adapters
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing)
    return perform(
        "fleet unshare",
        lambda progress: fleet_unshare(
            adapter,
            options=replace(options, names=names),
            compute=compute,
            writing=target,
            progress=progress,
        ),
        _show,
        target,
        reporting,
    )


def _show(result: FleetUnshareResult) -> None:
    print_table(
        ["adapter", "rank", "size", "error of rounding", "error of sharing"],
        "<>>>>",
        [
            [
                printable(one.name),
                str(one.rank),
                human_bytes(one.bytes_out),
                number(one.relative_error),
                number(one.shared_error),
            ]
            for one in result.adapters
        ],
    )
