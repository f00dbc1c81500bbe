"""`loratools dequantize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.outcome import written_to
from loratools.cli.output import human_bytes, note, number, print_json, progress_bar
from loratools.operations.dequantize import DequantizeResult, DTypeName, dequantize
from loratools_formats.checkpoints.checkpoint import read_checkpoint


@click.command("dequantize")
@shared.base_argument
@shared.output_options
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    default="bf16",
    show_default=True,
    help="Type of the new weights.",
)
@shared.max_shard_size_option
@shared.workers_option
@shared.json_option
@shared.quiet_option
def command(
    base: Path,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    dtype: DTypeName,
    max_shard_size: str | None,
    workers: int,
    as_json: bool,
    quiet: bool,
) -> int:
    """Turn a checkpoint's four-bit weights back into 16 or 32 bits.

    \b
    loratools dequantize my-model-nf4 -o my-model-16bit
    """  # noqa: D301 - click reads the backspace
    checkpoint = read_checkpoint(base)
    target = written_to(output, base, overwrite=overwrite, dry_run=dry_run)
    with progress_bar("dequantize", quiet=quiet, unit="B") as progress:
        result = dequantize(
            checkpoint,
            target,
            dtype,
            max_shard_bytes=None if max_shard_size is None else shared.parsed_size(max_shard_size),
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    if as_json:
        print_json({"operation": "dequantize", **dataclasses.asdict(result)})
    elif not quiet:
        _print_report(result)
    if not quiet:
        note("dry run, nothing was written" if target is None else f"wrote {target}")
    return 0


def _print_report(result: DequantizeResult) -> None:
    kinds = sorted({tensor.quant_type for tensor in result.tensors})
    click.echo(f"weights: {len(result.tensors)} from {', '.join(kinds)}")
    click.echo(f"relative error of rounding: {number(result.relative_error)}")
    click.echo(f"size: {human_bytes(result.bytes_in)} → {human_bytes(result.bytes_out)}")
    for text in result.notes:
        note(text)
