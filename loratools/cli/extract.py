"""`loratools extract`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.errors import EXIT_ERROR
from loratools.cli.outcome import checked_target, conclude, exceeds, scratch_folder
from loratools.cli.output import (
    choices_as_json,
    human_bytes,
    note,
    number,
    percent,
    print_choices,
    print_json,
    print_table,
    progress_bar,
    quantity,
)
from loratools.factors.resize import ComputeOptions
from loratools.operations.extract.operation import Difference, difference, extract, extract_choices
from loratools.operations.to_lora import FoldResult
from loratools.work.selection import Selection
from loratools_formats import get_format, write_adapter
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint


@click.command("extract")
@click.argument("base", type=shared.PATH)
@click.argument("tuned", type=shared.PATH)
@shared.output_options
@click.option("--base-name", help="What to record as the base model's name.")
@shared.rank_options
@shared.compute_options("--method")
@shared.selection_options
@shared.max_error_option
@shared.json_option
@shared.quiet_option
def command(
    base: Path,
    tuned: Path,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    base_name: str | None,
    rule: RankRule,
    compute: ComputeOptions,
    include: str | None,
    exclude: str | None,
    max_error: float | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Extract the LoRA between two checkpoints.

    BASE and TUNED are checkpoint folders or safetensors files of one model, before and after
    training. Without a rule for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools extract base-model tuned-model -o my-lora --rank 32
    """  # noqa: D301 - click reads the backspace
    before, after = read_checkpoint(base), read_checkpoint(tuned)
    recorded = base_name or _recorded_name(before) or str(base)
    found = difference(
        before, after, Selection(include, exclude), base_name=recorded, workers=compute.threads
    )
    if not quiet:
        for text in found.notes:
            note(text)
        if found.skipped:
            note(f"changed but not selected: {', '.join(found.skipped)}")
    if not rule.is_given:
        _print_choices(found, compute, as_json=as_json)
        click.echo("Choose with --rank, --energy, --budget or another rule; see --help.", err=True)
        return EXIT_ERROR
    target = checked_target(output, [], [base, tuned], overwrite=overwrite, dry_run=dry_run)
    with progress_bar("extract", quiet=quiet) as progress:
        result = extract(
            before,
            after,
            found,
            rule,
            compute,
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    if target is not None and not exceeds(result.relative_error, max_error):
        write_adapter(result.adapter, target, "peft", overwrite=overwrite)
    if as_json:
        print_json(_as_json(found, result))
    elif not quiet:
        _print_report(found, result)
    return conclude(result.relative_error, max_error, target, quiet=quiet)


def _recorded_name(base: Checkpoint) -> str | None:
    name = base.config.get("_name_or_path")
    return name if isinstance(name, str) and name and not Path(name).is_absolute() else None


def _nbytes(result: FoldResult) -> int:
    return get_format("peft").weights_nbytes(result.adapter)


def _as_json(found: Difference, result: FoldResult) -> dict[str, object]:
    return {
        "operation": "extract",
        "relative_error": result.relative_error,
        "bytes_out": _nbytes(result),
        "unchanged": found.unchanged,
        "skipped": list(found.skipped),
        "replaced": [r.target for r in result.adapter.replacements.values()],
        "modules": [
            {
                "name": module.name,
                "rank": module.rank,
                "energy": module.energy,
                "relative_error": module.relative_error,
            }
            for module in result.modules
        ],
    }


def _print_report(found: Difference, result: FoldResult) -> None:
    print_table(
        ["module", "rank", "energy kept", "relative error"],
        "<>>>",
        [
            [
                module.name,
                str(module.rank),
                percent(module.energy),
                number(module.relative_error),
            ]
            for module in result.modules
        ],
    )
    for replacement in result.adapter.replacements.values():
        click.echo(f"carried whole: {replacement.target}")
    click.echo(f"unchanged: {quantity(found.unchanged, 'tensor')}")
    click.echo(f"relative error: {number(result.relative_error)}")
    click.echo(f"size: {human_bytes(_nbytes(result))}")


def _print_choices(found: Difference, compute: ComputeOptions, *, as_json: bool) -> None:
    choices = extract_choices(found, compute).choices
    if as_json:
        print_json({"operation": "extract", "choices": choices_as_json(choices)})
        return
    print_choices(None, choices)
