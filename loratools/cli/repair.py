"""`loratools repair`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.base.decompositions import IntruderOptions
from loratools.cli import measuring
from loratools.cli import options as shared
from loratools.cli.outcome import checked_target, conclude, exceeds, read_source, scratch_folder
from loratools.cli.output import number, print_json, print_table, progress_bar
from loratools.factors.resize import ComputeOptions
from loratools.operations.repair import RepairOptions, RepairResult, repair
from loratools.work.selection import Selection
from loratools_formats import write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import printable


@click.command("repair")
@shared.adapter_argument
@shared.output_options
@shared.base_option
@click.option("--keep-intruders", is_flag=True, help="Leave intruder dimensions as they are.")
@measuring.intruder_options
@click.option(
    "--lambda",
    "shrink",
    type=float,
    default=0.75,
    show_default=True,
    help="What singular values of intruder dimensions are multiplied by.",
)
@click.option(
    "--keep-every-rank", is_flag=True, help="Let ranks grow by the edits, losing only rounding."
)
@click.option("--drop-dead", is_flag=True, help="Drop modules that change nothing.")
@click.option("--rebalance", is_flag=True, help="Balance factors of very different norms.")
@click.option("--dtype", type=click.Choice(["f32", "f16", "bf16"]), help="Type of new factors.")
@shared.selection_options
@shared.max_error_option
@shared.workers_option
@shared.from_option
@shared.carry_unknown_option
@shared.json_option
@shared.quiet_option
def command(
    adapter: Path,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    base: Path | None,
    keep_intruders: bool,
    intruders: IntruderOptions,
    shrink: float,
    keep_every_rank: bool,
    drop_dead: bool,
    rebalance: bool,
    dtype: measuring.FactorType | None,
    include: str | None,
    exclude: str | None,
    max_error: float | None,
    workers: int,
    format_name: str | None,
    carry_unknown: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Shrink an adapter's intruder dimensions, drop dead modules, balance one-sided factors.

    Intruder dimensions are leading singular vectors of W + ΔW that are far from all of W's; with
    them, an adapter forgets more of what the base knew (arXiv 2410.21228).

    \b
    loratools repair my-adapter --base model -o repaired
    loratools repair my-adapter -o tidy --keep-intruders --drop-dead --rebalance
    """  # noqa: D301 - click reads the backspace
    options = RepairOptions(
        intruders=None if keep_intruders else intruders,
        shrink=shrink,
        keep_every_rank=keep_every_rank,
        drop_dead=drop_dead,
        rebalance=rebalance,
    )
    source, sources = read_source(
        adapter, None, format_name, carry_unknown=carry_unknown, quiet=quiet
    )
    target = checked_target(output, sources, [base], overwrite=overwrite, dry_run=dry_run)
    with progress_bar("repair", quiet=quiet) as progress:
        result = repair(
            source,
            options,
            base=None if base is None else read_checkpoint(base),
            compute=ComputeOptions(dtype=dtype, workers=workers),
            selection=Selection(include, exclude),
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    if target is not None and not exceeds(result.relative_error, max_error):
        write_adapter(result.adapter, target, result.adapter.format, overwrite=overwrite)
    if as_json:
        print_json(result.to_dict())
    elif not quiet:
        _print_report(result)
    return conclude(result.relative_error, max_error, target, quiet=quiet)


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
