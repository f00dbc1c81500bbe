"""`dequantize`: a checkpoint's quantised weights in 16 or 32 bits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loratools.face.declare import public
from loratools.face.output_names import check_model_name
from loratools.face.result import CheckpointResult
from loratools.face.source import WRITING, CopiedModel, destination, model
from loratools.operations import dequantize as working
from loratools.work.call import kept
from loratools.work.requests import Progress, Writing


@dataclass(frozen=True, kw_only=True, repr=False)
class DequantizeResult(CheckpointResult, working.DequantizeResult):
    """A checkpoint without quantised weights, written or measured."""

    operation: ClassVar[str] = "dequantize"


@public(writing=WRITING)
def dequantize(
    base: CopiedModel,
    *,
    options: working.DequantizeOptions,
    writing: Writing,
    progress: Progress | None = None,
) -> DequantizeResult:
    """Turn a checkpoint's quantised weights back into 16 or 32 bits.

    Without `output`, everything is computed and measured, but nothing is written.

    >>> import tempfile
    >>> import loratools as lt
    >>> folder = tempfile.TemporaryDirectory()
    >>> path = lt.quantize("examples/tiny-llama/model").write(f"{folder.name}/nf4")
    >>> lt.dequantize(path, dtype="f32").relative_error
    0.0
    >>> folder.cleanup()

    Args:
        base: a checkpoint.
        progress: called with (bytes done, bytes in all).

    Raises:
        AdapterError: no quantised weights, malformed ones, or values beyond the type.
        UnsupportedError: a quantisation that is not known; the error names it.
        OutputExistsError: the output exists and `overwrite` is false.
        OutputError: it could not be written.
    """
    checkpoint = model(base)
    writing = destination(writing, None, [checkpoint])
    check_model_name(writing.output, "folder" if checkpoint.is_folder else ".safetensors")

    def run(output: Path | None, overwrite: bool) -> working.DequantizeResult:
        return working.dequantize(
            checkpoint,
            output,
            options.dtype,
            max_shard_bytes=options.max_shard_bytes,
            overwrite=overwrite,
            workers=options.workers,
            progress=progress,
        )

    return DequantizeResult.of(run(writing.output, writing.overwrite), run=kept(run))
