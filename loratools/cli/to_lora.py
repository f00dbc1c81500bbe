"""`loratools to-lora`."""

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
    planned_nbytes,
    read_source,
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
)
from loratools.factors.resize import ComputeOptions
from loratools.operations.to_lora import FoldChoices, Folding, FoldResult, fold_choices, to_lora
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats import get_format, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError, UnsupportedError


@named_command("to-lora")
@shared.adapter_argument
@shared.writes("in_place", "max_error")
@shared.reads("base", "initial", "from_", "carry_unknown")
@shared.takes(Folding, into="folding")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute")
@shared.reports()
def command(
    adapter: Path,
    writing: Writing,
    reading: Reading,
    folding: Folding,
    rule: RankRule,
    compute: ComputeOptions,
    reporting: Reporting,
) -> int:
    """Turn an adapter of any kind into a plain LoRA.

    Kinds that are low rank in disguise fold exactly. Others (DoRA, OFT, FourierFT ...) are
    approximated by the best factors of the rank asked for, and the error is stated; without a rule
    for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools to-lora my-loha -o plain
    loratools to-lora my-dora --base model -o plain --rank 64
    """  # noqa: D301 - click reads the backspace
    source = read_source(adapter, reading, reporting)
    checkpoint = None if reading.base is None else read_checkpoint(reading.base)
    given = dict(folding.set_)
    if folding.exact and rule.is_given:
        raise OptionError("`exact=True` keeps changes whole, and leaves no rank to choose")
    if not rule.is_given and not folding.exact:
        choices = fold_choices(source, compute, base=checkpoint, given=given)
        if choices is not None:
            if reporting.json or not reporting.quiet:
                _print_choices(source, choices, as_json=reporting.json)
            return show_how_to_choose(
                writing,
                reporting,
                " `loratools fuse` puts the change into the model without loss.",
            )
    target = checked_target(writing, [adapter, reading.initial, reading.base])
    with progress_bar("to-lora", quiet=reporting.quiet) as progress:
        result = to_lora(
            source,
            rule,
            compute,
            base=checkpoint,
            given=given,
            whole=folding.exact,
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    _check_format(result, result.adapter.format)
    if target is not None and not exceeds(result.relative_error, writing.max_error):
        write_adapter(result.adapter, target, result.adapter.format, overwrite=writing.overwrite)
    if reporting.json:
        print_json(_as_json(source, result))
    elif not reporting.quiet:
        _print_report(source, result)
    if not reporting.quiet:
        for text in result.cautions:
            note(text)
    return conclude(result.relative_error, writing, target, reporting)


def _check_format(result: FoldResult, name: str) -> None:
    """Refuse full differences in a format that has none, on a dry run too."""
    losses = get_format(name).losses
    found = [] if losses is None else losses(result.adapter)
    if found:
        raise UnsupportedError(
            f"format {name} cannot hold it: {found[0].reason}",
            tensor=found[0].name,
            hint="Choose a rank instead of `exact`, or put the change into the model with "
            "`loratools fuse`",
        )


def _sizes(source: Adapter, result: FoldResult) -> tuple[int, int]:
    return source.weights_nbytes, planned_nbytes(result.adapter)


def _as_json(source: Adapter, result: FoldResult) -> dict[str, object]:
    bytes_in, bytes_out = _sizes(source, result)
    return {
        "operation": "to-lora",
        "relative_error": result.relative_error,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "cautions": list(result.cautions),
        "modules": [
            {
                "name": module.name,
                "kind": module.kind,
                "rank": module.rank,
                "energy": module.energy,
                "relative_error": module.relative_error,
                "low_rank_energy": module.low_rank_energy,
                "rescaling_energy": module.rescaling_energy,
            }
            for module in result.modules
        ],
    }


def _share(value: float | None) -> str:
    return "" if value is None else percent(value)


def _print_report(source: Adapter, result: FoldResult) -> None:
    header = ["module", "kind", "rank", "energy kept", "relative error"]
    rows = [
        [
            module.name,
            module.kind,
            "whole" if module.rank is None else str(module.rank),
            percent(module.energy),
            number(module.relative_error),
        ]
        for module in result.modules
    ]
    if any(module.low_rank_energy is not None for module in result.modules):
        header += ["factors", "rescaling"]
        rows = [
            [*row, _share(module.low_rank_energy), _share(module.rescaling_energy)]
            for row, module in zip(rows, result.modules, strict=True)
        ]
    print_table(header, "<<" + ">" * (len(header) - 2), rows)
    bytes_in, bytes_out = _sizes(source, result)
    click.echo(f"relative error: {number(result.relative_error)}")
    click.echo(f"size: {human_bytes(bytes_in)} → {human_bytes(bytes_out)}")


def _print_choices(source: Adapter, found: FoldChoices, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "operation": "to-lora",
                "bytes_in": source.weights_nbytes,
                "low_rank_energy": found.low_rank_energy,
                "rescaling_energy": found.rescaling_energy,
                "choices": choices_as_json(found.choices),
            }
        )
        return
    print_choices(source.weights_nbytes, found.choices)
    if found.low_rank_energy is not None and found.rescaling_energy is not None:
        click.echo(
            f"energy of the DoRA's rescaled factors: {percent(found.low_rank_energy)}, of its "
            f"rescaling of the base: {percent(found.rescaling_energy)} (they overlap)"
        )
