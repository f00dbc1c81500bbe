"""Writing a checkpoint whose weights are stored in another type, as quantize and dequantize do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from loratools.operations.reported import report
from loratools.work.parallel import one_blas_thread
from loratools.work.provenance import record_metadata
from loratools.work.requests import Progress
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.checkpoint_write import (
    NewCheckpoint,
    recorded,
    write_checkpoint,
)
from loratools_formats.checkpoints.shard_plan import Shard
from loratools_formats.core.findings import Finding


class Rewritten(Protocol):
    """What became of a checkpoint: the error of all its new weights, and its sizes."""

    @property
    def relative_error(self) -> float: ...  # noqa: D102 - as in the results
    @property
    def bytes_in(self) -> int: ...  # noqa: D102
    @property
    def bytes_out(self) -> int: ...  # noqa: D102


def write_rewritten(
    base: Checkpoint,
    shards: Sequence[Shard],
    config: Mapping[str, Any] | None,
    record: Mapping[str, Any],
    result: Callable[[], Rewritten],
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    workers: int,
    progress: Progress | None,
) -> list[Finding]:
    """Write a checkpoint, whole or not at all, and return what a user should know of it.

    Args:
        base: what it was made from.
        shards: its weights, which are computed while they are written.
        config: its configuration; None to copy the base's.
        record: how it is made.
        result: returns what was done, once the weights are written.
        output: where to write.
        overwrite: replace an existing output.
        workers: threads.
        progress: called with (bytes done, bytes in all).

    Raises:
        OutputExistsError: the output exists.
        OutputError: it could not be written.
    """

    def provenance() -> Mapping[str, Any]:
        done = result()
        return {**record, "report": report(done.relative_error, done.bytes_out, done.bytes_in)}

    new = NewCheckpoint(base, recorded(shards, record_metadata(record)), config, provenance)
    with one_blas_thread():  # the sums of errors; threads go over weights
        left_out = write_checkpoint(
            new, output, overwrite=overwrite, workers=workers, progress=progress
        )
    message = f"not carried over: {', '.join(left_out)}"
    return [Finding("files-left-out", "note", None, message)] if left_out else []
