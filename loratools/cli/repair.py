"""`loratools repair`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from loratools.base.decompositions import IntruderOptions
from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.errors import EXIT_FOUND
from loratools.cli.output import note, number, print_json, print_table, progress_bar
from loratools.cli.perform import target_of
from loratools.face.source import beside, destination, opened
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.repair import RepairOptions, RepairResult, repair
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Selection
from loratools_formats import write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import printable


@named_command("repair")
@shared.adapter_argument
@shared.writes("in_place", "max_error")
@shared.reads("base", "from_", "carry_unknown", "ignore_key")
@shared.takes(RepairOptions, into="options")
@shared.takes(IntruderOptions, into="intruders")
@shared.takes(ComputeOptions, "dtype", into="compute")
@shared.takes(Selection, into="selection")
@shared.takes(Workers, into="threads")
@shared.reports()
def command(
    adapter: Path,
    writing: Writing,
    reading: Reading,
    options: RepairOptions,
    intruders: IntruderOptions,
    compute: ComputeOptions,
    selection: Selection,
    threads: Workers,
    reporting: Reporting,
) -> int:
    """Shrink an adapter's intruder dimensions, drop dead modules, balance factors.

    Intruder dimensions are leading singular vectors of W + ΔW that are far from all of W's; with
    them, an adapter forgets more of what the base knew (arXiv 2410.21228).

    \b
    loratools repair my-adapter --base model -o repaired
    loratools repair my-adapter -o tidy --keep-intruders --drop-dead --rebalance
    """  # noqa: D301 - click reads the backspace
    source = opened(adapter, reading)
    target = destination(target_of(writing), source, [source, reading.base])
    with progress_bar("repair", quiet=reporting.quiet) as progress:
        result = repair(
            source,
            replace(options, intruders=intruders),
            base=None if reading.base is None else read_checkpoint(reading.base),
            compute=compute,
            selection=selection,
            workers=threads.workers,
            scratch_folder=beside(target),
            progress=progress,
        )
    exceeds = writing.max_error is not None and not result.relative_error <= writing.max_error
    if target.output is not None and not exceeds:
        write_adapter(
            result.adapter, target.output, result.adapter.format, overwrite=target.overwrite
        )
    if reporting.json:
        print_json(result.to_dict())
    elif not reporting.quiet:
        _print_report(result)
    if exceeds:
        click.echo(
            f"relative error {number(result.relative_error)} is above --max-error "
            f"{writing.max_error:g}; nothing was written",
            err=True,
        )
        return EXIT_FOUND
    if not reporting.quiet:
        where = target.output
        note("dry run, nothing was written" if where is None else f"wrote {where}")
    return 0


def _print_report(result: RepairResult) -> None:
    shown = [module for module in result.modules if module.action != "kept" or module.undetermined]
    if shown:
        print_table(
            ["module", "repair", "rank", "intruders", "change", "relative error"],
            "<<>>>>",
            [
                [
                    printable(module.name),
                    module.action,
                    f"{module.rank_in} → {module.rank_out}",
                    f"{module.intruders} + {module.undetermined}?"
                    if module.undetermined
                    else str(module.intruders),
                    number(module.change),
                    number(module.relative_error),
                ]
                for module in shown
            ],
        )
    kept = sum(module.action == "kept" for module in result.modules)
    click.echo(f"modules: {len(result.modules) - kept} repaired, {kept} kept as they are")
    click.echo(f"change: {number(result.change)} of ‖ΔW‖")
    click.echo(f"relative error of what is stored: {number(result.relative_error)}")
