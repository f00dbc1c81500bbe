"""`loratools dequantize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.outcome import checked_target, say_written
from loratools.cli.output import human_bytes, note, number, print_json, progress_bar
from loratools.operations.dequantize import DequantizeOptions, DequantizeResult, dequantize
from loratools.work.requests import Reporting, Writing
from loratools_formats.checkpoints.checkpoint import read_checkpoint


@named_command("dequantize")
@shared.base_argument
@shared.writes()
@shared.takes(DequantizeOptions, into="options")
@shared.reports()
def command(base: Path, writing: Writing, options: DequantizeOptions, reporting: Reporting) -> int:
    """Turn a checkpoint's four-bit weights back into 16 or 32 bits.

    \b
    loratools dequantize my-model-nf4 -o my-model-16bit
    """  # noqa: D301 - click reads the backspace
    checkpoint = read_checkpoint(base)
    target = checked_target(writing, [base])
    with progress_bar("dequantize", quiet=reporting.quiet, unit="B") as progress:
        result = dequantize(
            checkpoint,
            target,
            options.dtype,
            max_shard_bytes=options.max_shard_bytes,
            overwrite=writing.overwrite,
            workers=options.workers,
            progress=progress,
        )
    if reporting.json:
        print_json({"operation": "dequantize", **dataclasses.asdict(result)})
    elif not reporting.quiet:
        _print_report(result)
    say_written(target, reporting)
    return 0


def _print_report(result: DequantizeResult) -> None:
    kinds = sorted({tensor.quant_type for tensor in result.tensors})
    click.echo(f"weights: {len(result.tensors)} from {', '.join(kinds)}")
    click.echo(f"relative error of rounding: {number(result.relative_error)}")
    click.echo(f"size: {human_bytes(result.bytes_in)} → {human_bytes(result.bytes_out)}")
    for text in result.notes:
        note(text)
