"""Fusing: a merged checkpoint from a base and adapters, streamed, without instantiating a model.

Untouched tensors are copied byte for byte inside the kernel; touched ones are read, added to in
float32 or float64, rounded once and written, a block of rows at a time. Memory is that of a few
blocks and of one module's factors per worker, whatever the size of the checkpoint.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from threadpoolctl import threadpool_limits

from loratools.device import Device, DeviceName
from loratools.fuse.plan import FuseInput, FusePlan, TensorPlan, plan_fuse
from loratools.fuse.tensor import Array, TensorReport, fuse_tensor
from loratools.provenance import operation_record
from loratools_formats.checkpoint import Checkpoint
from loratools_formats.checkpoint_write import NewCheckpoint, grouped, write_checkpoint
from loratools_formats.errors import OptionError
from loratools_formats.shards import Blank, Made, Part, Sink

_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class FuseOptions:
    """How to fuse.

    Attributes:
        dtype: `f32`, `f16` or `bf16` for all floating tensors; each keeps its own by default.
        max_shard_bytes: fill shards up to this size; as in the base by default.
        workers: threads.
        device: where products are computed.
    """

    dtype: str | None = None
    max_shard_bytes: int | None = None
    workers: int = 2
    device: DeviceName = "cpu"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise OptionError("too few workers", got=self.workers, expected="at least 1")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise OptionError("no such type", got=self.dtype, expected=" or ".join(_DTYPES))

    @property
    def code(self) -> str | None:
        """The type's name in a safetensors header."""
        return None if self.dtype is None else _DTYPES[self.dtype]


@dataclass(frozen=True)
class FuseResult:
    """What fusing did.

    Attributes:
        tensors: every touched tensor, in the base's order.
        copied: number of tensors copied byte for byte.
        nbytes: size of the weight files.
        shards: their names.
        notes: what a user should know.
        left_out: files of the base that were not carried over.
    """

    tensors: tuple[TensorReport, ...]
    copied: int
    nbytes: int
    shards: tuple[str, ...]
    notes: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def relative_change(self) -> float:
        """‖ΔW‖/‖W‖ over all touched tensors; 0 if there are none."""
        base = math.sqrt(sum(t.base_norm**2 for t in self.tensors))
        return math.sqrt(sum(t.delta_norm**2 for t in self.tensors)) / base if base else 0.0

    @property
    def lost(self) -> float:
        """Share of ΔW lost to rounding over all touched tensors."""
        delta = math.sqrt(sum(t.delta_norm**2 for t in self.tensors))
        return math.sqrt(sum(t.rounding_norm**2 for t in self.tensors)) / delta if delta else 0.0


class Fusion:
    """A planned fusion, ready to be written.

    Args:
        base: the checkpoint.
        inputs: adapters with their weights.
        options: how.

    Raises:
        LoratoolsError: as `plan_fuse` does.
    """

    def __init__(self, base: Checkpoint, inputs: Sequence[FuseInput], options: FuseOptions) -> None:
        self.options = options
        self.inputs = tuple(inputs)
        self.plan: FusePlan = plan_fuse(base, inputs, options.code)
        self._device = Device(options.device)
        self._reports: dict[str, TensorReport] = {}
        self._lock = threading.Lock()
        self.new = NewCheckpoint(
            base,
            grouped(base, self._parts(), max_shard_bytes=options.max_shard_bytes),
            self.plan.config,
            self._record(base),
            tuple(item.adapter for item in self.inputs),
        )

    def _record(self, base: Checkpoint) -> Mapping[str, Any]:
        options = {
            "weights": [item.weight for item in self.inputs],
            "dtype": self.options.dtype,
            "max_shard_bytes": self.options.max_shard_bytes,
        }
        names = {f"adapter {i}": item.adapter for i, item in enumerate(self.inputs, 1)}
        return operation_record("fuse", names, options, base)

    def _parts(self) -> dict[str, Part]:
        return {
            key: plan.source if plan.is_copy else self._made(plan)
            for key, plan in self.plan.tensors.items()
        }

    def _made(self, plan: TensorPlan) -> Made:
        width = plan.dtype.bits // 8

        def fill(sinks: Mapping[str, Sink]) -> None:
            sink = sinks[plan.key]

            def store(start: int, values: Array) -> None:
                sink.write_at(start * width, values.view("u1").data)

            report = fuse_tensor(plan, self._device, store)
            if plan.is_touched:
                with self._lock:
                    self._reports[plan.key] = report

        return Made((Blank(plan.key, plan.dtype, plan.source.shape),), fill)

    def write(
        self,
        output: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> FuseResult:
        """Write the fused checkpoint, whole or not at all, and say what it did.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: not enough space, or writing failed; nothing was changed.
            AdapterError: an input is malformed, or values are not finite.
        """
        with threadpool_limits(1):
            left_out = write_checkpoint(
                self.new,
                output,
                overwrite=overwrite,
                workers=self.options.workers,
                progress=progress,
            )
        plans = self.plan.tensors
        return FuseResult(
            tensors=tuple(self._reports[key] for key in plans if key in self._reports),
            copied=sum(plan.is_copy for plan in plans.values()),
            nbytes=self.new.nbytes,
            shards=tuple(shard.name for shard in self.new.shards),
            notes=self.plan.notes,
            left_out=left_out,
        )
