"""`loratools squeeze`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.errors import EXIT_ERROR, EXIT_FOUND
from loratools.cli.output import (
    human_bytes,
    note,
    number,
    percent,
    print_json,
    print_table,
    progress_bar,
)
from loratools.initial import subtract_initial
from loratools.ranks import RankChoice, RankRule
from loratools.resize import ComputeOptions
from loratools.squeeze import Selection, SqueezeResult, rank_choices, squeeze
from loratools_formats import get_format, read_adapter, write_adapter
from loratools_formats.adapter import Adapter
from loratools_formats.errors import OptionError
from loratools_formats.registry import check_output


@click.command("squeeze")
@shared.adapter_argument
@shared.output_options
@shared.rank_options
@shared.compute_options
@shared.selection_options
@click.option("--max-error", type=float, help="Write nothing, exit 1, if the error is above this.")
@click.option(
    "--initial",
    type=click.Path(path_type=Path),
    help="The adapter as saved before training, for PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.",
)
@shared.json_option
@shared.quiet_option
def command(
    adapter: Path,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    rule: RankRule,
    options: ComputeOptions,
    include: str | None,
    exclude: str | None,
    max_error: float | None,
    initial: Path | None,
    as_json: bool,
    quiet: bool,
) -> int:
    r"""Compress an adapter's ranks with the smallest possible error.

    Without a rule for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools squeeze my-adapter -o smaller --rank 16
    loratools squeeze my-adapter -o smaller --budget 25%
    """
    source = _read(adapter, initial, quiet=quiet)
    selection = Selection(include, exclude)
    if not rule.is_given:
        _print_choices(source, rank_choices(source, options, selection), as_json=as_json)
        click.echo("Choose with --rank, --energy, --budget or another rule; see --help.", err=True)
        return EXIT_ERROR
    target = None if dry_run else _checked(output, source, overwrite=overwrite)
    with progress_bar("squeeze", quiet=quiet) as progress:
        result = squeeze(
            source,
            rule,
            options,
            selection,
            scratch_folder=None if target is None else target.resolve().parent,
            progress=progress,
        )
    too_large = max_error is not None and result.relative_error > max_error
    if target is not None and not too_large:
        write_adapter(result.adapter, target, source.format, overwrite=overwrite)
    if as_json:
        print_json(_as_json(source, result))
    elif not quiet:
        _print_report(source, result)
    if too_large:
        click.echo(
            f"relative error {number(result.relative_error)} is above --max-error {max_error:g}; "
            "nothing was written",
            err=True,
        )
        return EXIT_FOUND
    if not quiet:
        note("dry run, nothing was written" if target is None else f"wrote {target}")
    return 0


def _read(path: Path, initial: Path | None, *, quiet: bool) -> Adapter:
    adapter = read_adapter(path)
    if initial is not None:
        adapter = subtract_initial(adapter, read_adapter(initial))
    if not quiet:
        for text in adapter.notes:
            note(text)
    return adapter


def _checked(output: Path | None, source: Adapter, *, overwrite: bool) -> Path:
    if output is None:
        raise OptionError("no output given", hint="Add -o OUTPUT, or --dry-run")
    check_output(source, output, overwrite=overwrite)
    return output


def _sizes(source: Adapter, result: SqueezeResult) -> tuple[int, int]:
    planned = get_format(source.format).weights_nbytes
    return source.weights_nbytes, 0 if planned is None else planned(result.adapter)


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
    bytes_in, bytes_out = _sizes(source, result)
    of_what = " of the DoRA direction" if result.directional else ""
    click.echo(f"relative error{of_what}: {number(result.relative_error)}")
    share = percent(bytes_out / bytes_in)
    click.echo(f"size: {human_bytes(bytes_in)} → {human_bytes(bytes_out)} ({share})")


def _print_choices(source: Adapter, choices: list[RankChoice], *, as_json: bool) -> None:
    if as_json:
        rows = [
            {
                "rank": choice.rank,
                "bytes": choice.nbytes,
                "energy": choice.energy,
                "relative_error": choice.relative_error,
            }
            for choice in choices
        ]
        print_json({"operation": "squeeze", "bytes_in": source.weights_nbytes, "choices": rows})
        return
    print_table(
        ["rank", "size", "of input", "energy kept", "relative error"],
        ">>>>>",
        [
            [
                str(choice.rank),
                human_bytes(choice.nbytes),
                percent(choice.nbytes / source.weights_nbytes),
                percent(choice.energy),
                number(choice.relative_error),
            ]
            for choice in choices
        ],
    )
