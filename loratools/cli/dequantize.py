"""`loratools dequantize`."""

from __future__ import annotations

from pathlib import Path

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import human_bytes, number, say
from loratools.cli.perform import perform, target_of
from loratools.face.dequantize import DequantizeResult, dequantize
from loratools.operations.dequantize import DequantizeOptions
from loratools.work.requests import Reporting, Writing


@named_command("dequantize")
@shared.base_argument
@shared.writes()
@shared.takes(DequantizeOptions, into="options")
@shared.reports()
def command(base: Path, writing: Writing, options: DequantizeOptions, reporting: Reporting) -> int:
    """Turn a checkpoint's quantised weights back into 16 or 32 bits.

    Reads bitsandbytes in four bits, eight-bit floats, MLX, GPTQ, AWQ, compressed-tensors, MXFP4 and
    NVFP4.

    \b
    loratools dequantize my-model-nf4 -o my-model-16bit
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing)
    return perform(
        "dequantize",
        lambda progress: dequantize(base, options=options, writing=target, progress=progress),
        _show,
        target,
        reporting,
        unit="B",
    )


def _show(result: DequantizeResult) -> None:
    kinds = sorted({tensor.quant_type for tensor in result.tensors})
    say(f"weights: {len(result.tensors)} from {', '.join(kinds)}")
    say(f"relative error of rounding: {number(result.relative_error)}")
    say(f"size: {human_bytes(result.bytes_in)} → {human_bytes(result.bytes_out)}")
