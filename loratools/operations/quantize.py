"""Quantise a checkpoint's linear layers to four bits, in the layout of bitsandbytes.

Every weight is read in pieces, quantised and written where it belongs; nothing is held but its
scales. The bytes are those that bitsandbytes' CPU code makes, except for the mean of the scales
that double quantisation subtracts, which its own depends on the number of threads. Everything else
in the checkpoint, weights already in four bits included, is copied bit for bit. A checkpoint that
is quantised in another way is read as the plain one that it stands for.

What it does not: experts that are stacked in one tensor, for which there is no four-bit layout.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.base.dequantised import (
    DequantisedCheckpoint,
    dequantised,
    dequantised_metadata,
    in_16_bits,
)
from loratools.base.fourbit.encode import FourBitOptions, QuantisationLoss
from loratools.base.fourbit.store import blanks, fill
from loratools.base.linears import Kept, Linears, linear_weights
from loratools.operations.rewrite import write_rewritten
from loratools.work.declared import option
from loratools.work.parallel import in_order, usable_cores
from loratools.work.provenance import operation_record
from loratools.work.regexes import check_regex
from loratools.work.requests import Progress, Sharding
from loratools_formats.checkpoints.bitsandbytes import (
    is_four_bit_config,
    quantization_config,
    torch_name,
)
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.checkpoint_write import grouped
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.checkpoints.quantization import stated_of
from loratools_formats.checkpoints.shard_plan import Made, NewTensor, Sink
from loratools_formats.core.dtypes import DType
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import Buffer, TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_PIECE = 1 << 20  # elements read at a time


@dataclass(frozen=True)
class QuantizeOptions(Sharding):
    """What to quantise, and how.

    Attributes:
        four_bit: type, blocksize and double quantisation.
        skip: leave modules whose path matches as they are.
        experts: quantise experts stored one by one too, which transformers 5 cannot load.

    Raises:
        OptionError: not a regular expression.
    """

    four_bit: FourBitOptions = field(default_factory=FourBitOptions)
    skip: tuple[str, ...] = option(
        (), heading="Selection", name="exclude", aliases=("--skip",), metavar="REGEX"
    )
    experts: bool = option(False, heading="Selection")

    def __post_init__(self) -> None:
        for pattern in self.skip:
            check_regex(pattern)

    def record(self) -> dict[str, Any]:
        """Return what determines the output, for its provenance."""
        return {
            "quant_type": self.four_bit.quant_type,
            "blocksize": self.four_bit.blocksize,
            "double_quant": self.four_bit.double_quant,
            "skip": list(self.skip),
            "experts": self.experts,
        }


@dataclass(frozen=True)
class QuantizedTensor:
    """What became of one weight.

    Attributes:
        name: its key.
        shape: as it was stored.
        bytes_in: size before.
        bytes_out: size of all its tensors after.
        relative_error: ‖W − W'‖_F/‖W‖_F, where W' is what the stored bytes mean in float32.
    """

    name: str
    shape: tuple[int, ...]
    bytes_in: int
    bytes_out: int
    relative_error: float


@dataclass(frozen=True)
class QuantizeResult:
    """What was done.

    Attributes:
        tensors: one report for each weight that was quantised, in the checkpoint's order.
        relative_error: over all of these together.
        kept: two-dimensional weights that were not quantised, and why.
        bytes_in: size of all tensors before.
        bytes_out: size of all tensors after.
        findings: what a user should know.
    """

    tensors: tuple[QuantizedTensor, ...]
    relative_error: float
    kept: tuple[Kept, ...]
    bytes_in: int
    bytes_out: int
    findings: tuple[Finding, ...]


def quantize(
    base: Checkpoint,
    output: str | os.PathLike[str] | None,
    options: QuantizeOptions | None = None,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantise a checkpoint's linear layers.

    Args:
        base: the checkpoint, a folder with its configuration.
        output: folder to write; None computes the report and writes nothing.
        options: what and how.
        overwrite: replace an existing output.
        workers: threads, the usable cores by default; the bytes do not depend on them.
        progress: called with (bytes done, bytes in all).

    Raises:
        AdapterError: nothing to quantise, or a weight holds NaN or infinite values.
        UnsupportedError: the checkpoint is quantised in a way that cannot be read.
        OutputExistsError: the output exists.
        OutputError: it could not be written.
    """
    chosen, workers = options or QuantizeOptions(), workers or usable_cores()
    _check_base(base)
    view = dequantised(base)
    already = {key: w for key, w in view.weights.items() if w.is_four_bit_format}
    places = view.places
    metadata = dequantised_metadata(view) or base.files[0].metadata
    _check_statement(base, view)
    if view.is_quantized and not already:
        base = in_16_bits(view)
    elif len(already) < len(view.weights):
        raise UnsupportedError(
            "the checkpoint is quantised in four bits and in another way",
            path=base.path,
            tensor=next(key for key in view.weights if key not in already),
            hint=f"Make it plain first: loratools dequantize {base.path} -o plain",
        )
    taken = {tensor.key: weight for weight in already.values() for tensor in weight.parts}
    linears = linear_weights(base, taken, chosen.skip, experts=chosen.experts)
    if not linears.weights:
        got = f"{len(already)} in four bits already" if already else None
        raise AdapterError("no weight to quantise", path=base.path, got=got)
    jobs = {
        key: _Job(ref, chosen.four_bit, is_conv1d(key, base.config))
        for key, ref in linears.weights.items()
    }
    parts: dict[str, NewTensor] = {
        key: jobs[key].made if key in jobs else ref for key, ref in base.tensors.items()
    }
    findings = _findings(linears, len(already))
    if output is None:
        for _ in in_order(_Job.measure, jobs.values(), workers):
            pass
    else:
        record = operation_record("quantize", {}, chosen.record(), base)
        shards = grouped(
            base,
            parts,
            max_shard_bytes=chosen.max_shard_bytes,
            metadata={**metadata, "format": "pt"},
            places={} if already else places,
        )
        findings += write_rewritten(
            base,
            shards,
            _config(base, linears, chosen.four_bit),
            record,
            lambda: _result(base, list(jobs.values()), linears, ()),
            output,
            overwrite=overwrite,
            workers=workers,
            progress=progress,
        )
    return _result(base, list(jobs.values()), linears, findings)


def _check_base(base: Checkpoint) -> None:
    if not base.is_folder:
        raise UnsupportedError(
            "a single file cannot say how it is quantised",
            path=base.path,
            expected="a checkpoint folder with a config.json",
        )
    if not base.config:
        raise AdapterError("no config.json, which must say how it is quantised", path=base.path)


def _check_statement(base: Checkpoint, view: DequantisedCheckpoint) -> None:
    """Refuse a configuration that states a quantisation of which there is no tensor.

    Raises:
        UnsupportedError: it does, and is not one of bitsandbytes in four bits.
    """
    stated = stated_of(base)
    method = stated.get("quant_method")
    if method and not view.is_quantized and not is_four_bit_config(stated):
        raise UnsupportedError(
            "config.json says that the checkpoint is already quantised in another way",
            path=base.path,
            got=f"quant_method {method}, and no quantised weight",
            hint="Remove quantization_config from config.json if its weights are plain",
        )


def _findings(linears: Linears, already: int) -> list[Finding]:
    found = []
    if already:
        message = f"{already} weights are in four bits already and were copied as they are"
        found.append(Finding("already-quantised", "note", None, message))
    experts = sum(kept.reason == "expert" for kept in linears.kept)
    if experts:
        message = (
            f"{experts} weights of experts stay as they are, since transformers 5 cannot load "
            "them in four bits; `experts=True` quantises them for other loaders"
        )
        found.append(Finding("experts-kept", "note", None, message))
    if linears.stacks:
        message = (
            f"{len(linears.stacks)} tensors of stacked experts stay as they are: there is no "
            "four-bit layout for them"
        )
        found.append(Finding("stacks-kept", "note", None, message))
    return found


def _config(base: Checkpoint, linears: Linears, options: FourBitOptions) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for ref in linears.weights.values():
        sizes[torch_name(ref.dtype)] += ref.numel
    entry = quantization_config(
        options.quant_type,
        double_quant=options.double_quant,
        compute_dtype=sizes.most_common(1)[0][0],
        skipped=linears.listed(),
    )
    return {**base.config, "quantization_config": entry}


def _result(
    base: Checkpoint, jobs: Sequence[_Job], linears: Linears, findings: Sequence[Finding]
) -> QuantizeResult:
    reports = []
    for job in jobs:
        if job.loss is None:
            raise AdapterError("weight was not quantised", tensor=job.ref.key)
        error = job.loss.relative
        reports.append(
            QuantizedTensor(job.ref.key, job.ref.shape, job.ref.nbytes, job.nbytes, error)
        )
    bytes_in = sum(ref.nbytes for file in base.files for ref in file.tensors.values())
    rest = sum(ref.nbytes for ref in base.tensors.values())
    found = [job.loss for job in jobs if job.loss is not None]
    overall = QuantisationLoss(
        sum(x.squared_error for x in found), sum(x.squared_norm for x in found)
    )
    return QuantizeResult(
        tuple(reports),
        overall.relative,
        linears.kept,
        bytes_in,
        rest + sum(report.bytes_out - report.bytes_in for report in reports),
        tuple(findings),
    )


class _Job:
    """One weight to be quantised, and what came of it."""

    def __init__(self, ref: TensorRef, options: FourBitOptions, transposed: bool) -> None:
        self.ref = ref
        self.loss: QuantisationLoss | None = None
        self.nbytes = 0
        self._options = options
        self._transposed = transposed
        self._shape = ref.shape[::-1] if transposed else ref.shape
        self._blanks = blanks(ref.key, self._shape, options)

    @property
    def made(self) -> Made:
        """The tensors to write."""
        return Made(self._blanks, self._fill)

    def measure(self) -> None:
        """Quantise and write nothing."""
        self._fill({})

    def _fill(self, sinks: Mapping[str, Sink]) -> None:
        counting = {blank.key: _Counting(sinks.get(blank.key)) for blank in self._blanks}
        pieces = transposed_pieces(self.ref) if self._transposed else pieces_of(self.ref)
        dtype: DType = self.ref.dtype
        self.loss = fill(counting, self.ref.key, self._shape, dtype, self._options, pieces)
        self.nbytes = sum(sink.nbytes for sink in counting.values())


class _Counting:
    """A sink that counts bytes and passes them on, if there is anywhere to."""

    def __init__(self, sink: Sink | None) -> None:
        self._sink = sink
        self.nbytes = 0

    def write_at(self, offset: int, data: Buffer) -> None:
        """Take bytes."""
        if self._sink is not None:
            self._sink.write_at(offset, data)
        self.nbytes += memoryview(data).nbytes


def pieces_of(ref: TensorRef) -> Iterator[NDArray[Any]]:
    """Yield a tensor's elements in order, in its stored type, a few at a time."""
    for start in range(0, ref.numel, _PIECE):
        yield ref.elements(start, min(start + _PIECE, ref.numel))


def transposed_pieces(ref: TensorRef) -> Iterator[NDArray[Any]]:
    """Yield the elements of the (rows, columns) tensor's transpose, a few columns at a time."""
    rows, columns = ref.shape
    whole = ref.load()
    width = max(1, _PIECE // max(rows, 1))
    for start in range(0, columns, width):
        yield np.ascontiguousarray(whole[:, start : start + width].T)
