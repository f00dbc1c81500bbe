"""`loratools quantize`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from loratools.base.fourbit.encode import FourBitOptions
from loratools.cli import options as shared
from loratools.cli.by_type import Column, print_modules
from loratools.cli.command import command as named_command
from loratools.cli.output import human_bytes, number, percent, say, sizes
from loratools.cli.perform import perform, target_of
from loratools.face.quantize import QuantizeResult, quantize
from loratools.operations.quantize import QuantizeOptions
from loratools.work.parallel import Workers
from loratools.work.requests import Reporting, Writing


@named_command("quantize")
@shared.base_argument
@shared.writes()
@shared.takes(FourBitOptions, into="four_bit")
@shared.takes(QuantizeOptions, into="options")
@shared.takes(Workers, into="threads")
@shared.reports("json", "quiet", "verbose")
def command(
    base: Path,
    writing: Writing,
    four_bit: FourBitOptions,
    options: QuantizeOptions,
    threads: Workers,
    reporting: Reporting,
) -> int:
    """Quantise a checkpoint to four bits, byte for byte as bitsandbytes does.

    Linear layers become NF4 or FP4 weights in the layout of bitsandbytes, which transformers
    loads as they are. Output embedding, embeddings, norms and biases stay in 16 or 32 bits.

    \b
    loratools quantize my-model -o my-model-nf4
    loratools quantize my-model -o fp4 --quant-type fp4 --exclude 'layers\\.0\\.'
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing)
    return perform(
        "quantize",
        lambda progress: quantize(
            base,
            four_bit=four_bit,
            options=options,
            threads=threads,
            writing=target,
            progress=progress,
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
        unit="B",
    )


def _show(result: QuantizeResult, *, verbose: bool) -> None:
    tensors = result.tensors
    errors = [tensor.relative_error for tensor in tensors]
    bytes_ = [f"{human_bytes(t.bytes_in)} → {human_bytes(t.bytes_out)}" for t in tensors]
    shares = [tensor.bytes_out / tensor.bytes_in for tensor in tensors]
    columns = [
        Column("shape", ["×".join(map(str, tensor.shape)) for tensor in tensors], str),
        Column("size", bytes_, str),
        Column("of its size", shares, percent, listed=False, summed=True),
        Column("relative error", errors, summed=True),
    ]
    names = [tensor.name for tensor in tensors]
    print_modules("weight", names, columns, errors, verbose=verbose)
    reasons = Counter(kept.reason for kept in result.kept)
    kept = ", ".join(f"{count} ({reason})" for reason, count in sorted(reasons.items()))
    say(f"weights kept: {kept or 'none'}")
    say(f"relative error: {number(result.relative_error)}")
    say(f"size: {sizes(result.bytes_in, result.bytes_out)}")
