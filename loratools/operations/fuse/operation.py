"""Fusing: a merged checkpoint from a base and adapters, streamed, without instantiating a model.

Untouched tensors are copied byte for byte inside the kernel; touched ones are read, added to in
float32 or float64, rounded once and written, a block of rows at a time. Memory is that of a few
blocks and of one module's factors per worker, whatever the size of the checkpoint.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratools.algebra.device import Device
from loratools.base.dequantised import (
    dequantised_metadata,
)
from loratools.folding.without_base import folded_where_exact
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.loss import lost_to_rounding, noise, refuse_erased, refuse_rounded
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.result import FusePreview, FuseResult
from loratools.operations.fuse.storage import (
    caveats,
    caveats_written,
    config_of,
    no_longer_quantised,
    plan_storage,
)
from loratools.operations.fuse.tensor import TensorReport, fuse_tensor
from loratools.operations.fuse.trained_on import trained_on_notes
from loratools.operations.reported import report
from loratools.work.call import kept
from loratools.work.parallel import one_blas_thread
from loratools.work.provenance import operation_record, record_metadata
from loratools.work.requests import Progress
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.checkpoint_write import (
    NewCheckpoint,
    grouped,
    recorded,
    write_checkpoint,
)
from loratools_formats.checkpoints.quantization import quantization_of
from loratools_formats.checkpoints.shard_plan import Blank, Made, NewTensor, Sink
from loratools_formats.core.dtypes import Array
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError


def refuse_nothing(plans: Iterable[TensorPlan], inputs: Sequence[FuseInput]) -> None:
    """Refuse to fuse what changes nothing.

    Raises:
        AdapterError: no adapter has a module or a tensor that replaces one of the base.
    """
    if not any(plan.is_touched for plan in plans):
        path = inputs[0].adapter.source if inputs else None
        raise AdapterError("there is no module to fuse", path=path, got="0 modules in the adapters")


_COMPARED = 1 << 20  # elements compared at a time


class Fusion:
    """A planned fusion, ready to be written.

    Args:
        base: the checkpoint.
        inputs: adapters with their weights.
        options: how.

    Attributes:
        reports: what was measured in the tensors that are written.

    Raises:
        LoratoolsError: as `plan_fuse` does.
    """

    def __init__(self, base: Checkpoint, inputs: Sequence[FuseInput], options: FuseOptions) -> None:
        self.options = options
        self._record = kept(self._recorded)
        self.inputs = tuple(
            replace(
                item,
                adapter=folded_where_exact(item.adapter, "fuse", None, base=base, dense=False),
            )
            for item in inputs
        )
        self._base = base
        self._storage = plan_storage(base, self.inputs, options)
        self._dequantised, self.plan = self._storage.base, self._storage.plan
        is_plain = options.trained_on is None and quantization_of(base.config) is None
        adapters = [item.adapter for item in self.inputs] if is_plain else []
        self._about = (*self.plan.findings, *trained_on_notes(adapters))
        refuse_nothing(self.plan.tensors.values(), self.inputs)
        self._device = Device(options.device)
        self.reports: dict[str, TensorReport] = {}
        self._lock = threading.Lock()
        self._shards = grouped(
            base,
            self._parts(),
            max_shard_bytes=options.max_shard_bytes,
            metadata=None if options.keeps_format else dequantised_metadata(self._dequantised),
            places=self._dequantised.places,
        )

    @functools.cached_property
    def new(self) -> NewCheckpoint:
        """What is written; the headers of its shards hold digests of the adapters."""
        return NewCheckpoint(
            self._base,
            recorded(self._shards, record_metadata(self.record)),
            config_of(self._storage, self.options),
            self._provenance,
            tuple(item.adapter for item in self.inputs),
        )

    @functools.cached_property
    def record(self) -> Mapping[str, Any]:
        """How it is made."""
        return self._record()

    def _provenance(self) -> Mapping[str, Any]:
        lost = lost_to_rounding(list(self.reports.values()))
        return {**self.record, "report": report(lost, self.new.nbytes, self.nbytes_in)}

    @property
    def nbytes_in(self) -> int:
        """Size of the base's weight files."""
        return sum(file.file.nbytes for file in self._base.files)

    def _recorded(self) -> Mapping[str, Any]:
        names = {f"adapter {i}": item.adapter for i, item in enumerate(self.inputs, 1)}
        return operation_record("fuse", names, self.recorded_options, self._base)

    @property
    def recorded_options(self) -> Mapping[str, Any]:
        """The options that the record has."""
        return {
            "weights": [item.weight for item in self.inputs],
            "dtype": self.options.dtype,
            "max_shard_bytes": self.options.max_shard_bytes,
            "base_mode": "dequant" if self._dequantised.is_quantized else None,
            "requantize": self.options.requantize,
            "changed_bits": self.options.changed_bits,
            "trained_on": self.options.trained_on,
        }

    def _parts(self) -> dict[str, NewTensor]:
        parts: dict[str, NewTensor] = {}
        for key, plan in self.plan.tensors.items():
            if key in self._storage.verbatim:
                parts |= {part.key: part for part in self._storage.verbatim[key].parts}
            elif key in self._storage.encoders:
                parts |= self._encoded(plan)
            else:
                parts[key] = plan.source if plan.is_copy else self._made(plan)
        if self.options.keeps_format:
            of_weights = {p.key for w in self._dequantised.weights.values() for p in w.parts}
            of_running = (k for k in self._dequantised.dropped if k not in of_weights)
            parts |= {key: self._base.tensors[key] for key in of_running}
        return parts

    def _encoded(self, plan: TensorPlan) -> dict[str, NewTensor]:
        """Return the tensors of a changed weight: those computed, and those that stay."""
        work = self._storage.encoded(plan, self._device)

        def fill(sinks: Mapping[str, Sink]) -> None:
            self._report(work.fill(sinks))

        computed = {blank.key for blank in work.blanks}
        parts = self._dequantised.weights[plan.key].parts
        made = {work.blanks[0].key: Made(work.blanks, fill)}
        return made | {part.key: part for part in parts if part.key not in computed}

    def _report(self, found: TensorReport) -> None:
        with self._lock:
            self.reports[found.key] = found

    def _made(self, plan: TensorPlan) -> Made:
        width = plan.dtype.bits // 8

        def fill(sinks: Mapping[str, Sink]) -> None:
            sink = sinks[plan.key]

            def store(start: int, values: Array) -> None:
                sink.write_at(start * width, values.view("u1").data)

            found = fuse_tensor(plan, self._device, store)
            if plan.is_touched:
                self._report(self._with_base_rounding(found))

        return Made((Blank(plan.key, plan.dtype, plan.source.shape),), fill)

    def _with_base_rounding(self, found: TensorReport) -> TensorReport:
        """Return a report that says how far the base was moved before anything was added."""
        if found.key not in self._storage.rounded:
            return found
        before, after = (c.tensors[found.key] for c in (self._base, self._dequantised.checkpoint))
        moved = 0.0
        for start in range(0, before.numel, _COMPARED):
            stop = min(start + _COMPARED, before.numel)
            old, new = (t.elements(start, stop).astype(np.float64) for t in (before, after))
            moved += float(np.dot(new - old, new - old))
        return replace(found, base_rounding=math.sqrt(moved))

    def _accept(self) -> None:
        """Refuse a result in which most of the change is erased.

        Raises:
            UnsupportedError: less than half of it survives, and that was not allowed.
        """
        quantised = [r for r in self.reports.values() if r.surviving is not None]
        refuse_erased(
            quantised,
            self._base.path,
            what=f"the steps of {' and '.join(sorted({r.dtype for r in quantised}))}",
            hint="Leave out `requantize` to store 16 bits, or pass `allow_lossy=True`",
            allow_lossy=self.options.allow_lossy,
        )
        refuse_rounded(
            list(self.reports.values()), self._base.path, allow_lossy=self.options.allow_lossy
        )

    @property
    def preview(self) -> FusePreview:
        """What would be written."""
        touched = self.plan.touched
        return FusePreview(
            touched,
            {plan.key: self._type_name(plan) for plan in touched},
            len(self.plan.tensors),
            self.new.nbytes,
            len(self.new.shards),
            self._about,
        )

    def _type_name(self, plan: TensorPlan) -> str:
        encoder = self._storage.encoders.get(plan.key)
        return plan.dtype.code if encoder is None else encoder.scheme.short

    def _findings(self) -> list[Finding]:
        if not self.options.keeps_format:
            return no_longer_quantised(self._storage, self.options.dtype)
        changed = [self._dequantised.weights[key] for key in self._storage.encoders]
        noisy = noise(list(self.reports.values()))
        return [*caveats(changed), *caveats_written(changed), *noisy]

    def write(
        self,
        output: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
        ready: Path | None = None,
    ) -> FuseResult:
        """Write the fused checkpoint, whole or not at all, and say what it did.

        Args:
            output: where.
            overwrite: replace an output that exists.
            progress: called with (bytes done, bytes in all).
            ready: folder that holds all weight files already; `reports` describes them.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: not enough space, or writing failed; nothing was changed.
            AdapterError: an input is malformed, or values are not finite.
        """
        with one_blas_thread():
            left_out = write_checkpoint(
                self.new,
                output,
                overwrite=overwrite,
                workers=self.options.workers,
                progress=progress,
                accept=self._accept,
                ready=ready,
            )
        plans = self.plan.tensors
        keeps = self.options.keeps_format
        converted = {
            key for key, plan in plans.items() if not keeps and self._storage.is_converted(plan)
        }
        return FuseResult(
            tensors=tuple(self.reports[key] for key in plans if key in self.reports),
            copied=sum(key not in converted and key not in self.reports for key in plans),
            converted=len(converted),
            nbytes=self.new.nbytes,
            shards=tuple(shard.name for shard in self.new.shards),
            findings=(*self._about, *self._findings()),
            left_out=left_out,
        )
