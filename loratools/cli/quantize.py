"""`loratools quantize`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import click

from loratools.base.fourbit.encode import FourBitOptions
from loratools.cli import options as shared
from loratools.cli.outcome import written_to
from loratools.cli.output import (
    human_bytes,
    note,
    number,
    percent,
    print_json,
    print_table,
    progress_bar,
)
from loratools.operations.quantize import QuantizeOptions, QuantizeResult, quantize
from loratools_formats.checkpoints.bitsandbytes import QuantType
from loratools_formats.checkpoints.checkpoint import read_checkpoint


@click.command("quantize")
@shared.base_argument
@shared.output_options
@click.option(
    "--quant-type",
    type=click.Choice(["nf4", "fp4"]),
    default="nf4",
    show_default=True,
    help="The four-bit type.",
)
@click.option(
    "--blocksize",
    type=int,
    default=64,
    show_default=True,
    help="Elements that share a scale: a power of two from 32 to 4096.",
)
@click.option(
    "--double-quant/--no-double-quant",
    default=True,
    show_default=True,
    help="Quantise the scales too.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="REGEX",
    help="Leave modules whose path matches as they are. Repeatable.",
)
@click.option(
    "--experts",
    is_flag=True,
    help="Quantise experts stored one by one too, which transformers 5 cannot load.",
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
    quant_type: QuantType,
    blocksize: int,
    double_quant: bool,
    skip: tuple[str, ...],
    experts: bool,
    max_shard_size: str | None,
    workers: int,
    as_json: bool,
    quiet: bool,
) -> int:
    """Quantise a checkpoint to four bits, byte for byte as bitsandbytes does.

    Linear layers become NF4 or FP4 weights in the layout of bitsandbytes, which transformers
    loads as they are. Output embedding, embeddings, norms and biases stay in 16 or 32 bits.

    \b
    loratools quantize my-model -o my-model-nf4
    loratools quantize my-model -o my-model-fp4 --quant-type fp4 --skip 'layers\\.0\\.'
    """  # noqa: D301 - click reads the backspace
    four_bit = FourBitOptions(quant_type, blocksize, double_quant)
    options = QuantizeOptions(
        four_bit,
        skip,
        experts,
        None if max_shard_size is None else shared.parsed_size(max_shard_size),
    )
    checkpoint = read_checkpoint(base)
    target = written_to(output, base, overwrite=overwrite, dry_run=dry_run)
    with progress_bar("quantize", quiet=quiet, unit="B") as progress:
        result = quantize(
            checkpoint, target, options, overwrite=overwrite, workers=workers, progress=progress
        )
    if as_json:
        print_json({"operation": "quantize", **dataclasses.asdict(result)})
    elif not quiet:
        _print_report(result)
    if not quiet:
        note("dry run, nothing was written" if target is None else f"wrote {target}")
    return 0


def _print_report(result: QuantizeResult) -> None:
    print_table(
        ["weight", "shape", "size", "relative error"],
        "<>>>",
        [
            [
                tensor.name,
                "×".join(map(str, tensor.shape)),
                f"{human_bytes(tensor.bytes_in)} → {human_bytes(tensor.bytes_out)}",
                number(tensor.relative_error),
            ]
            for tensor in result.tensors
        ],
    )
    reasons = Counter(kept.reason for kept in result.kept)
    kept = ", ".join(f"{count} ({reason})" for reason, count in sorted(reasons.items()))
    click.echo(f"weights kept: {kept or 'none'}")
    click.echo(f"relative error: {number(result.relative_error)}")
    share = percent(result.bytes_out / result.bytes_in)
    click.echo(f"size: {human_bytes(result.bytes_in)} → {human_bytes(result.bytes_out)} ({share})")
    for text in result.notes:
        note(text)
