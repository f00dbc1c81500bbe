"""Turn a checkpoint's four-bit weights of bitsandbytes back into plain ones.

Values are codebook · scale in float32, rounded once to the type asked for; how much that rounding
changes is measured. Every other tensor is copied bit for bit, and `quantization_config` goes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from loratools.base.dequantised import dequantised_config
from loratools.base.fourbit.decode import CHUNK, Dequantizer
from loratools.base.fourbit.encode import QuantisationLoss
from loratools.work.buffers import Buffers
from loratools.work.declared import option
from loratools.work.parallel import Workers, in_order, usable_cores
from loratools.work.provenance import operation_record
from loratools.work.requests import Sharding
from loratools.work.spellings import dtype as dtype_name
from loratools_formats.checkpoints.bitsandbytes import (
    QuantizedWeight,
    quantized_weights,
    torch_name,
)
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.checkpoint_write import NewCheckpoint, grouped, write_checkpoint
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.checkpoints.shard_plan import Blank, Made, NewTensor, Sink
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError

DTypeName = Literal["bf16", "f16", "f32"]


@dataclass(frozen=True)
class DequantizeOptions(Sharding, Workers):
    """How to turn four-bit weights back.

    Attributes:
        dtype: type of the new weights.
    """

    dtype: DTypeName = option("bf16", heading="Computing", aliases=("--outtype",), parse=dtype_name)


_BUFFERS = Buffers()
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class DequantizedTensor:
    """What became of one weight.

    Attributes:
        name: its key.
        shape: as it is stored now.
        quant_type: what it was.
        bytes_in: size of all its tensors before.
        bytes_out: size after.
        relative_error: of rounding to the new type, against the values in float32.
    """

    name: str
    shape: tuple[int, ...]
    quant_type: str
    bytes_in: int
    bytes_out: int
    relative_error: float


@dataclass(frozen=True)
class DequantizeResult:
    """What was done.

    Attributes:
        tensors: one report for each weight, in the checkpoint's order.
        relative_error: of rounding, over all of them.
        bytes_in: size of all tensors before.
        bytes_out: size of all tensors after.
        findings: what a user should know.
    """

    tensors: tuple[DequantizedTensor, ...]
    relative_error: float
    bytes_in: int
    bytes_out: int
    findings: tuple[Finding, ...]


def dequantize(
    base: Checkpoint,
    output: str | os.PathLike[str] | None,
    dtype: DTypeName = "bf16",
    *,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DequantizeResult:
    """Turn all four-bit weights of a checkpoint into plain ones.

    Args:
        base: the checkpoint.
        output: where to write; None computes the report and writes nothing.
        dtype: type of the new weights.
        max_shard_bytes: split the output anew, into files of at most this size.
        overwrite: replace an existing output.
        workers: threads, the usable cores by default; the bytes do not depend on them.
        progress: called with (bytes done, bytes in all).

    Raises:
        AdapterError: no four-bit weights, or malformed ones.
        OutputExistsError: the output exists.
        OutputError: it could not be written.
    """
    workers = workers or usable_cores()
    weights = quantized_weights(base.tensors)
    if not weights:
        raise AdapterError(
            "no four-bit weights of bitsandbytes there",
            path=base.path,
            got=_method(base.config),
        )
    stored = DTYPES[dtype.upper()]
    jobs = {k: _Job(w, stored, is_conv1d(k, base.config)) for k, w in weights.items()}
    auxiliary = {t.key for w in weights.values() for t in w.tensors} - set(weights)
    parts: dict[str, NewTensor] = {
        key: jobs[key].made if key in jobs else ref
        for key, ref in base.tensors.items()
        if key not in auxiliary
    }
    findings: list[Finding] = []
    if output is None:
        for _ in in_order(_Job.measure, jobs.values(), workers):
            pass
    else:
        options = {"dtype": dtype}
        new = NewCheckpoint(
            base,
            grouped(base, parts, max_shard_bytes=max_shard_bytes),
            dequantised_config(base.config, torch_name(stored)) if base.config else None,
            lambda: operation_record("dequantize", {}, options, base),
        )
        with threadpool_limits(1):  # the sums of errors; threads go over weights
            left_out = write_checkpoint(
                new, output, overwrite=overwrite, workers=workers, progress=progress
            )
        if left_out:
            message = f"not carried over: {', '.join(left_out)}"
            findings.append(Finding("files-left-out", "note", None, message))
    return _result(base, list(jobs.values()), findings)


def _method(config: Mapping[str, Any]) -> str:
    found = config.get("quantization_config", _NOTHING)
    method = found.get("quant_method") if isinstance(found, Mapping) else None
    return "no quantization_config" if method is None else f"quant_method {method}"


def _result(
    base: Checkpoint, jobs: Sequence[_Job], findings: Sequence[Finding]
) -> DequantizeResult:
    reports = tuple(
        DequantizedTensor(
            job.weight.key,
            job.blank.shape,
            job.weight.quant_type,
            job.weight.nbytes,
            job.blank.nbytes,
            QuantisationLoss(job.squared_error, job.squared_norm).relative,
        )
        for job in jobs
    )
    bytes_in = sum(ref.nbytes for ref in base.tensors.values())
    return DequantizeResult(
        reports,
        QuantisationLoss(
            sum(j.squared_error for j in jobs), sum(j.squared_norm for j in jobs)
        ).relative,
        bytes_in,
        bytes_in + sum(report.bytes_out - report.bytes_in for report in reports),
        tuple(findings),
    )


class _Job:
    """One weight to be dequantised, and how far rounding moved it."""

    def __init__(self, weight: QuantizedWeight, dtype: DType, conv1d: bool) -> None:
        self.weight = weight
        self.squared_error = self.squared_norm = 0.0
        self._transposed = conv1d and len(weight.shape) == 2
        shape = weight.shape[::-1] if self._transposed else weight.shape
        self.blank = Blank(weight.key, dtype, shape)

    @property
    def made(self) -> Made:
        """The tensor to write."""
        return Made((self.blank,), self._fill)

    def measure(self) -> None:
        """Compute the error and write nothing."""
        values = Dequantizer(self.weight)
        for start in range(0, self.weight.numel, CHUNK):
            self._rounded(values, start, min(start + CHUNK, self.weight.numel))

    def _fill(self, sinks: Mapping[str, Sink]) -> None:
        sink = sinks[self.weight.key]
        values = Dequantizer(self.weight)
        width = self.blank.dtype.bits // 8
        whole = np.empty(self.weight.numel if self._transposed else 0, self._numpy)
        for start in range(0, self.weight.numel, CHUNK):
            stop = min(start + CHUNK, self.weight.numel)
            piece = self._rounded(values, start, stop)
            if self._transposed:
                whole[start:stop] = piece
            else:
                sink.write_at(start * width, piece.view(np.uint8).data)
        if self._transposed:
            transposed = np.ascontiguousarray(whole.reshape(self.weight.shape).T)
            sink.write_at(0, transposed.view(np.uint8).data)

    @property
    def _numpy(self) -> np.dtype[Any]:
        return self.blank.dtype.numpy_dtype()

    def _rounded(self, values: Dequantizer, start: int, stop: int) -> NDArray[Any]:
        """Return elements in the new type, and add up what rounding changed."""
        exact = values.elements(start, stop, _BUFFERS.array("exact", (stop - start,), np.float32))
        self.squared_norm += _squares(exact)
        if self.blank.dtype.code == "F32":
            return exact
        with np.errstate(over="ignore", under="ignore"):
            rounded = _BUFFERS.array("rounded", exact.shape, self._numpy)
            np.copyto(rounded, exact, casting="same_kind")
        exact -= rounded
        error = _squares(exact)
        if not math.isfinite(error):
            raise AdapterError(
                f"values do not fit dtype {self.blank.dtype.code}",
                tensor=self.weight.key,
                hint="Pass `dtype=bf16` or f32",
            )
        self.squared_error += error
        return rounded


def _squares(values: NDArray[Any]) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(values, values))
