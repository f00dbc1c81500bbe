"""`loratools to-dora`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.outcome import checked_target, conclude, read_source
from loratools.cli.output import note, number, print_json, print_table, progress_bar
from loratools.operations.to_dora import ToDoraResult, to_dora
from loratools_formats import write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint


@click.command("to-dora")
@shared.adapter_argument
@shared.output_options
@click.option(
    "--base",
    type=shared.PATH,
    required=True,
    help="The base model: a folder or a file.",
)
@click.option(
    "--workers", type=int, default=2, show_default=True, help="Threads over modules (CPU)."
)
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
    base: Path,
    workers: int,
    initial: Path | None,
    format_name: str | None,
    carry_unknown: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Turn a LoRA into a DoRA that makes the same change.

    The factors stay as they are, and every output gets the norm of its weight with the change as
    magnitude, so that the DoRA merges to the same weights and training can go on from it.

    \b
    loratools to-dora my-lora --base model -o my-dora
    """  # noqa: D301 - click reads the backspace
    source, sources = read_source(
        adapter, initial, format_name, carry_unknown=carry_unknown, quiet=quiet
    )
    target = checked_target(output, sources, [base], overwrite=overwrite, dry_run=dry_run)
    with progress_bar("to-dora", quiet=quiet) as progress:
        result = to_dora(source, read_checkpoint(base), workers=workers, progress=progress)
    if target is not None:
        write_adapter(result.adapter, target, source.format, overwrite=overwrite)
    if as_json:
        print_json(_as_json(result))
    elif not quiet:
        _print_report(result)
    if not quiet:
        note("magnitudes are rounded to float32; nothing else changes")
    return conclude(0.0, None, target, quiet=quiet)


def _as_json(result: ToDoraResult) -> dict[str, object]:
    return {
        "operation": "to-dora",
        "modules": [
            {
                "name": module.name,
                "rank": module.rank,
                "outputs": module.outputs,
                "least": module.least,
                "largest": module.largest,
            }
            for module in result.modules
        ],
    }


def _print_report(result: ToDoraResult) -> None:
    print_table(
        ["module", "rank", "outputs", "least magnitude", "largest"],
        "<>>>>",
        [
            [
                module.name,
                str(module.rank),
                str(module.outputs),
                number(module.least),
                number(module.largest),
            ]
            for module in result.modules
        ],
    )
