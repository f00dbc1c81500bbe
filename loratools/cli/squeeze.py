"""`loratools squeeze`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.errors import EXIT_ERROR
from loratools.cli.outcome import (
    checked_target,
    conclude,
    exceeds,
    planned_nbytes,
    read_source,
    scratch_folder,
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
from loratools.work.selection import Selection
from loratools_formats import write_adapter
from loratools_formats.core.adapter import Adapter


@click.command("squeeze")
@shared.adapter_argument
@shared.output_options
@shared.rank_options
@shared.compute_options("--method")
@shared.selection_options
@shared.max_error_option
@shared.initial_option
@shared.from_option
@shared.carry_unknown_option
@shared.json_option
@shared.quiet_option
def command(
    adapter: Path,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    rule: RankRule,
    compute: ComputeOptions,
    include: str | None,
    exclude: str | None,
    max_error: float | None,
    initial: Path | None,
    format_name: str | None,
    carry_unknown: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Compress an adapter's ranks with the smallest possible error.

    Without a rule for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools squeeze my-adapter -o smaller --rank 16
    loratools squeeze my-adapter -o smaller --budget 25%
    """  # noqa: D301 - click reads the backspace
    source, sources = read_source(
        adapter, initial, format_name, carry_unknown=carry_unknown, quiet=quiet
    )
    selection = Selection(include, exclude)
    if not rule.is_given:
        choices = rank_choices(source, compute, selection)
        if as_json:
            rows = choices_as_json(choices)
            print_json({"operation": "squeeze", "bytes_in": source.weights_nbytes, "choices": rows})
        else:
            print_choices(source.weights_nbytes, choices)
        click.echo("Choose with --rank, --energy, --budget or another rule; see --help.", err=True)
        return EXIT_ERROR
    target = checked_target(output, sources, overwrite=overwrite, dry_run=dry_run)
    with progress_bar("squeeze", quiet=quiet) as progress:
        result = squeeze(
            source,
            rule,
            compute,
            selection,
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    if target is not None and not exceeds(result.relative_error, max_error):
        write_adapter(result.adapter, target, result.adapter.format, overwrite=overwrite)
    if as_json:
        print_json(_as_json(source, result))
    elif not quiet:
        _print_report(source, result)
    return conclude(result.relative_error, max_error, target, quiet=quiet)


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
