"""`quantize`: a checkpoint's linear layers in four bits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from loratools.base.fourbit.encode import FourBitOptions
from loratools.face.declare import public
from loratools.face.output_names import check_model_name
from loratools.face.result import CheckpointResult
from loratools.face.source import WRITING, CopiedModel, destination, model
from loratools.operations import quantize as working
from loratools.work.call import kept
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Writing


@dataclass(frozen=True, kw_only=True, repr=False)
class QuantizeResult(CheckpointResult, working.QuantizeResult):
    """A checkpoint in four bits, written or measured."""

    operation: ClassVar[str] = "quantize"


@public(writing=WRITING)
def quantize(
    base: CopiedModel,
    *,
    four_bit: FourBitOptions,
    options: working.QuantizeOptions,
    threads: Workers,
    writing: Writing,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantise a checkpoint to four bits, byte for byte as bitsandbytes does.

    Without `output`, everything is computed and measured, but nothing is written.

    >>> import loratools as lt
    >>> result = lt.quantize("examples/tiny-llama/model")
    >>> result.tensors[0].shape, result.bytes_out < result.bytes_in
    ((128, 352), True)

    Args:
        base: a checkpoint folder.
        progress: called with (bytes done, bytes in all).

    Raises:
        AdapterError: nothing to quantise, or a weight holds NaN or infinite values.
        UnsupportedError: the checkpoint is quantised in another way.
        OptionError: no such blocksize, or not a regular expression.
        OutputExistsError: the output exists and `overwrite` is false.
        OutputError: it could not be written.
    """
    checkpoint = model(base)
    writing = destination(writing, None, [checkpoint])
    check_model_name(writing.output, "folder" if checkpoint.is_folder else ".safetensors")
    chosen = replace(options, four_bit=four_bit)

    def run(output: Path | None, overwrite: bool) -> working.QuantizeResult:
        return working.quantize(
            checkpoint,
            output,
            chosen,
            overwrite=overwrite,
            workers=threads.workers,
            progress=progress,
        )

    return QuantizeResult.of(run(writing.output, writing.overwrite), run=kept(run))
