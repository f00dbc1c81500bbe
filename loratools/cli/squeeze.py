"""`loratools squeeze`."""

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
from loratools.operations.squeeze import SqueezeResult, rank_choices, squeeze
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Selection
from loratools_formats import write_adapter
from loratools_formats.core.adapter import Adapter


@named_command("squeeze")
@shared.adapter_argument
@shared.writes("in_place", "max_error")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute")
@shared.takes(Selection, into="selection")
@shared.reads("initial", "from_", "carry_unknown")
@shared.reports()
def command(
    adapter: Path,
    writing: Writing,
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
    reading: Reading,
    reporting: Reporting,
) -> int:
    """Compress an adapter's ranks with the smallest possible error.

    Without a rule for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools squeeze my-adapter -o smaller --rank 16
    loratools squeeze my-adapter -o smaller --budget 25%
    """  # noqa: D301 - click reads the backspace
    source = read_source(adapter, reading, reporting)
    if not rule.is_given:
        choices = rank_choices(source, compute, selection)
        if reporting.json:
            rows = choices_as_json(choices)
            print_json({"operation": "squeeze", "bytes_in": source.weights_nbytes, "choices": rows})
        elif not reporting.quiet:
            print_choices(source.weights_nbytes, choices)
        return show_how_to_choose(writing, reporting)
    target = checked_target(writing, [adapter, reading.initial])
    with progress_bar("squeeze", quiet=reporting.quiet) as progress:
        result = squeeze(
            source,
            rule,
            compute,
            selection,
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    if target is not None and not exceeds(result.relative_error, writing.max_error):
        write_adapter(result.adapter, target, result.adapter.format, overwrite=writing.overwrite)
    if reporting.json:
        print_json(_as_json(source, result))
    elif not reporting.quiet:
        _print_report(source, result)
    return conclude(result.relative_error, writing, target, reporting)


def _sizes(source: Adapter, result: SqueezeResult) -> tuple[int, int]:
    return source.weights_nbytes, planned_nbytes(result.adapter)


def _as_json(source: Adapter, result: SqueezeResult) -> dict[str, object]:
    bytes_in, bytes_out = _sizes(source, result)
    return {
        "operation": "squeeze",
        "relative_error": result.relative_error,
        "directional": result.directional,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "modules": [
            {
                "name": module.name,
                "rank_in": module.rank_in,
                "rank_out": module.rank_out,
                "energy": module.energy,
                "relative_error": module.relative_error,
            }
            for module in result.modules
        ],
        "kept_whole": list(result.kept_whole),
    }


def _print_report(source: Adapter, result: SqueezeResult) -> None:
    print_table(
        ["module", "rank", "energy kept", "relative error"],
        "<>>>",
        [
            [
                module.name,
                f"{module.rank_in} → {module.rank_out}",
                percent(module.energy),
                number(module.relative_error),
            ]
            for module in result.modules
        ],
    )
    if result.kept_whole:
        count, first = len(result.kept_whole), result.kept_whole[0]
        more = f" and {count - 1} more" if count > 1 else ""
        note(f"kept as they are, for they have no factors: {first}{more}")
    bytes_in, bytes_out = _sizes(source, result)
    of_what = " of the DoRA direction" if result.directional else ""
    click.echo(f"relative error{of_what}: {number(result.relative_error)}")
    share = percent(bytes_out / bytes_in)
    click.echo(f"size: {human_bytes(bytes_in)} → {human_bytes(bytes_out)} ({share})")
