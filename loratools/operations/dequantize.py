"""Turn a checkpoint's quantised weights back into plain ones.

Values are those that the format's loaders compute with, rounded to the type asked for; how much
that rounding changes is measured. Weights of bitsandbytes are codebook · scale in float32, rounded
once. Every other tensor is copied bit for bit, and what says how weights were quantised goes.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.base.codecs import CodedWeight
from loratools.base.codecs.codec import CHUNK
from loratools.base.dequantised import (
    DequantisedCheckpoint,
    dequantised,
    dequantised_config,
    dequantised_metadata,
)
from loratools.base.fourbit.encode import QuantisationLoss
from loratools.lowrank.resize import OutputDtype
from loratools.operations.rewrite import write_rewritten
from loratools.work.buffers import Buffers
from loratools.work.declared import option
from loratools.work.parallel import Workers, in_order, usable_cores
from loratools.work.provenance import operation_record
from loratools.work.requests import Progress, Sharding
from loratools.work.spellings import dtype as dtype_name
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.checkpoint_write import grouped
from loratools_formats.checkpoints.quantization import stated_of
from loratools_formats.checkpoints.shard_plan import Blank, Made, NewTensor, Sink
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError


@dataclass(frozen=True)
class DequantizeOptions(Sharding, Workers):
    """How to turn quantised weights back.

    Attributes:
        dtype: type of the new weights.
    """

    dtype: OutputDtype = option(
        "bf16", heading="Computing", aliases=("--outtype",), parse=dtype_name
    )


_BUFFERS = Buffers()


@dataclass(frozen=True)
class DequantizedTensor:
    """What became of one weight.

    Attributes:
        name: its key.
        shape: as it is stored now.
        quant_type: what it was: nf4 or fp4 of bitsandbytes, or the name of its format.
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
    dtype: OutputDtype = "bf16",
    *,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> DequantizeResult:
    """Turn all quantised weights of a checkpoint into plain ones.

    Args:
        base: the checkpoint.
        output: where to write; None computes the report and writes nothing.
        dtype: type of the new weights.
        max_shard_bytes: split the output anew, into files of at most this size.
        overwrite: replace an existing output.
        workers: threads, the usable cores by default; the bytes do not depend on them.
        progress: called with (bytes done, bytes in all).

    Raises:
        AdapterError: no quantised weights, or malformed ones.
        UnsupportedError: a quantisation that is not known; the error names it.
        OutputExistsError: the output exists.
        OutputError: it could not be written.
    """
    workers = workers or usable_cores()
    view = dequantised(base)
    if not view.weights:
        raise AdapterError(
            "no quantised weights there",
            path=base.path,
            got=_method(stated_of(base)),
            hint=f"To see what it holds: loratools info {shlex.quote(str(base.path))}",
        )
    stored = DTYPES[dtype.upper()]
    jobs = {key: _Job(weight, stored) for key, weight in view.weights.items()}
    parts: dict[str, NewTensor] = {
        key: jobs[key].made if key in jobs else ref for key, ref in view.checkpoint.tensors.items()
    }
    findings: list[Finding] = []
    if output is None:
        for _ in in_order(_Job.measure, jobs.values(), workers):
            pass
    else:
        record = operation_record("dequantize", {}, {"dtype": dtype}, base)
        shards = grouped(
            base,
            parts,
            max_shard_bytes=max_shard_bytes,
            metadata=dequantised_metadata(view),
            places=view.places,
        )
        findings += write_rewritten(
            base,
            shards,
            dequantised_config(base.config, str(stored.torch)) if base.config else None,
            record,
            lambda: _result(view, base, list(jobs.values()), ()),
            output,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    return _result(view, base, list(jobs.values()), findings)


def _method(stated: Mapping[str, Any]) -> str:
    method = stated.get("quant_method")
    return "no quantization_config" if method is None else f"quant_method {method}"


def _result(
    view: DequantisedCheckpoint, base: Checkpoint, jobs: Sequence[_Job], findings: Sequence[Finding]
) -> DequantizeResult:
    reports = tuple(
        DequantizedTensor(
            job.weight.key,
            job.blank.shape,
            job.weight.scheme.name,
            job.weight.nbytes,
            job.blank.nbytes,
            QuantisationLoss(job.squared_error, job.squared_norm).relative,
        )
        for job in jobs
    )
    made = {job.weight.key: job.blank.nbytes for job in jobs}
    return DequantizeResult(
        reports,
        QuantisationLoss(
            sum(j.squared_error for j in jobs), sum(j.squared_norm for j in jobs)
        ).relative,
        sum(ref.nbytes for ref in base.tensors.values()),
        sum(made.get(key, ref.nbytes) for key, ref in view.checkpoint.tensors.items()),
        tuple(findings),
    )


class _Job:
    """One weight to be dequantised, and how far rounding moved it."""

    def __init__(self, weight: CodedWeight, dtype: DType) -> None:
        self.weight = weight
        self.squared_error = self.squared_norm = 0.0
        self.blank = Blank(weight.key, dtype, weight.shape)

    @property
    def made(self) -> Made:
        """The tensor to write."""
        return Made((self.blank,), self._fill)

    def measure(self) -> None:
        """Compute the error and write nothing."""
        for start, stop in self._pieces():
            self._rounded(start, stop)

    def _fill(self, sinks: Mapping[str, Sink]) -> None:
        sink = sinks[self.weight.key]
        width = self.blank.dtype.bits // 8
        for start, stop in self._pieces():
            sink.write_at(start * width, self._rounded(start, stop).view(np.uint8).data)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Return ranges of elements, of whole rows where these are short."""
        total, width = math.prod(self.weight.shape), self.weight.shape[-1]
        step = CHUNK // width * width or CHUNK
        for start in range(0, total, step):
            yield start, min(start + step, total)

    @property
    def _numpy(self) -> np.dtype[Any]:
        return self.blank.dtype.numpy_dtype()

    def _rounded(self, start: int, stop: int) -> NDArray[Any]:
        """Return elements in the new type, and add up what rounding changed."""
        exact = self.weight.exact(start, stop)
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
