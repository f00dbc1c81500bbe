"""`loratools extract`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.outcome import (
    checked_target,
    conclude,
    exceeds,
    scratch_folder,
    show_how_to_choose,
)
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
from loratools.operations.extract.operation import (
    Difference,
    Naming,
    difference,
    extract,
    extract_choices,
)
from loratools.operations.to_lora import FoldResult
from loratools.work.requests import Reporting, Writing
from loratools.work.selection import Selection
from loratools_formats import get_format, write_adapter
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint


@named_command("extract")
@shared.base_argument
@click.argument("tuned", type=shared.PATH)
@shared.writes("max_error")
@shared.takes(Naming, into="naming")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute")
@shared.takes(Selection, into="selection")
@shared.reports()
def command(
    base: Path,
    tuned: Path,
    writing: Writing,
    naming: Naming,
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
    reporting: Reporting,
) -> int:
    """Extract the LoRA between two checkpoints.

    BASE and TUNED are checkpoint folders or safetensors files of one model, before and after
    training. Without a rule for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools extract base-model tuned-model -o my-lora --rank 32
    """  # noqa: D301 - click reads the backspace
    before, after = read_checkpoint(base), read_checkpoint(tuned)
    recorded = naming.base_name or _recorded_name(before) or str(base)
    found = difference(before, after, selection, base_name=recorded, workers=compute.threads)
    if not reporting.quiet:
        for text in found.notes:
            note(text)
        if found.skipped:
            note(f"changed but not selected: {', '.join(found.skipped)}")
    if not rule.is_given:
        if reporting.json or not reporting.quiet:
            _print_choices(found, compute, as_json=reporting.json)
        return show_how_to_choose(writing, reporting)
    target = checked_target(writing, [base, tuned])
    with progress_bar("extract", quiet=reporting.quiet) as progress:
        result = extract(
            before,
            after,
            found,
            rule,
            compute,
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    if target is not None and not exceeds(result.relative_error, writing.max_error):
        write_adapter(result.adapter, target, "peft", overwrite=writing.overwrite)
    if reporting.json:
        print_json(_as_json(found, result))
    elif not reporting.quiet:
        _print_report(found, result)
    return conclude(result.relative_error, writing, target, reporting)


def _recorded_name(base: Checkpoint) -> str | None:
    name = base.config.get("_name_or_path")
    return name if isinstance(name, str) and name and not Path(name).is_absolute() else None


def _nbytes(result: FoldResult) -> int:
    planned = get_format("peft").weights_nbytes
    return 0 if planned is None else planned(result.adapter)


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
