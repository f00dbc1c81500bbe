"""Fusing: a merged checkpoint from a base and adapters, streamed, without instantiating a model.

Untouched tensors are copied byte for byte inside the kernel; touched ones are read, added to in
float32 or float64, rounded once and written, a block of rows at a time. Memory is that of a few
blocks and of one module's factors per worker, whatever the size of the checkpoint.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratools.algebra.device import Device
from loratools.base.codecs import CodedWeight, Encoder
from loratools.base.dequantised import (
    DequantisedCheckpoint,
    as_stored,
    config_beside,
    dequantised,
    dequantised_metadata,
    is_stored_plain,
)
from loratools.base.fourbit.round_trip import round_tripped
from loratools.folding.without_base import folded_where_exact
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.loss import lost_to_rounding, noise, refuse_erased, refuse_rounded
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.fuse.plan import FusePlan, TensorPlan, plan_fuse
from loratools.operations.fuse.reencode import Reencoded
from loratools.operations.fuse.result import FusePreview, FuseResult
from loratools.operations.fuse.tensor import TensorReport, fuse_tensor
from loratools.operations.fuse.trained_on import four_bits, trained_on_notes
from loratools.operations.reported import report
from loratools.work.call import kept
from loratools.work.parallel import one_blas_thread
from loratools.work.provenance import operation_record, record_metadata
from loratools_formats.checkpoints.bitsandbytes import QuantizedWeight
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.checkpoint_write import (
    NewCheckpoint,
    grouped,
    recorded,
    write_checkpoint,
)
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.checkpoints.quantization import quantization_of
from loratools_formats.checkpoints.shard_plan import Blank, Made, NewTensor, Sink
from loratools_formats.core.dtypes import Array
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError


def refuse_nothing(plans: Iterable[TensorPlan], inputs: Sequence[FuseInput]) -> None:
    """Refuse to fuse what changes nothing.

    Raises:
        AdapterError: no adapter has a module or a tensor that replaces one of the base.
    """
    if not any(plan.is_touched for plan in plans):
        path = inputs[0].adapter.source if inputs else None
        raise AdapterError("no module to fuse", path=path, got="0 modules in the adapters")


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
        self._rounded: frozenset[str] = frozenset()
        self._verbatim: Mapping[str, CodedWeight] = {}
        self._encoders: Mapping[str, Encoder] = {}
        self._dequantised, self.plan = self._planned()
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
            self._config(),
            self._provenance,
            tuple(item.adapter for item in self.inputs),
        )

    @functools.cached_property
    def record(self) -> Mapping[str, Any]:
        """How it is made."""
        return self._record()

    def _provenance(self) -> Mapping[str, Any]:
        lost = lost_to_rounding(list(self.reports.values()))
        nbytes_in = sum(file.file.nbytes for file in self._base.files)
        return {**self.record, "report": report(lost, self.new.nbytes, nbytes_in)}

    def _planned(self) -> tuple[DequantisedCheckpoint, FusePlan]:
        """Return the base as it is read, and what will be done with it.

        Quantised weights that no adapter changes stay as they are, with the base's configuration.

        Raises:
            UnsupportedError: one is to change, and its quantisation cannot be read.
        """
        base, options = self._base, self.options
        try:
            self._dequantised = dequantised(base)
        except UnsupportedError as unreadable:
            kept = as_stored(base)
            return kept, self._plan_beside(kept, unreadable)
        self._check_mode()
        if options.trained_on is not None:
            self._dequantised, self._rounded = self._round_trip(options.trained_on)
        checkpoint = self._dequantised.checkpoint
        if options.keeps_format:
            checkpoint = replace(checkpoint, config=base.config)
        plan = plan_fuse(checkpoint, self.inputs, options.code, self._dequantised.stored)
        keeps = not options.keeps_format and options.dtype is None and options.base_mode is None
        touched = {tensor.key for tensor in plan.touched}
        is_quantised, stored = self._dequantised.is_quantized, self._dequantised.stored
        if keeps and is_quantised and touched.isdisjoint(stored):
            kept = as_stored(base)
            return kept, plan_fuse(base, self.inputs)
        if keeps and is_quantised:
            plan = self._plan_mixed(touched) or plan
        if options.keeps_format:
            self._encode(touched)
        return self._dequantised, plan

    def _round_trip(self, spelling: str) -> tuple[DequantisedCheckpoint, frozenset[str]]:
        """Return the base with its linear weights rounded to four bits and back, and their names.

        Raises:
            OptionError: the base is quantised already.
        """
        if self._dequantised.is_quantized:
            raise OptionError(
                "`trained_on` has no meaning for a quantised base",
                path=self._base.path,
                hint="Leave it out: what is added to are the values of the quantised weights",
            )
        rounded, keys = round_tripped(self._base, four_bits(spelling))
        return replace(self._dequantised, checkpoint=rounded), keys

    def _encode(self, touched: Collection[str]) -> None:
        """Choose how each changed weight is stored; the others stay as they are.

        Raises:
            UnsupportedError: a weight's format is not written.
        """
        view, bits = self._dequantised, self.options.changed_bits
        changed = {key: w for key, w in view.weights.items() if key in touched}
        self._verbatim = {key: w for key, w in view.weights.items() if key not in touched}
        encoders = {}
        for key, weight in changed.items():
            if bits is None and key in view.four_bit:
                continue
            encoder = weight.encoder() if bits is None else weight.encoder_in(bits)
            if encoder is None:
                raise self._not_written(weight)
            encoders[key] = encoder
        self._encoders = encoders
        config = self._base.config
        if bits is not None:
            for key in sorted(changed):  # each has groups of its own size
                config = changed[key].config_in(config, [key.removesuffix(".weight")], bits)
        self._dequantised = replace(view, checkpoint=replace(view.checkpoint, config=config))

    def _not_written(self, weight: CodedWeight) -> UnsupportedError:
        bits = self.options.changed_bits
        what = "again" if bits is None else f"in {bits} bits"
        option = "requantize" if bits is None else "changed_bits"
        return UnsupportedError(
            f"a weight of this format cannot be written {what}",
            path=self._base.path,
            tensor=weight.key,
            got=str(weight.scheme),
            hint=f"Leave out `{option}`: changed weights are then stored in 16 bits",
        )

    def _plan_mixed(self, touched: Collection[str]) -> FusePlan | None:
        """Return a plan that leaves quantised weights as they are beside those that become plain.

        Returns:
            None if the format does not allow it.
        """
        view = self._dequantised
        weights = view.weights
        config = config_beside(self._base, [w for key, w in weights.items() if key in touched])
        if config is None:
            return None
        self._verbatim = {key: w for key, w in weights.items() if key not in touched}
        kept = {part.key for weight in self._verbatim.values() for part in weight.parts}
        checkpoint = replace(view.checkpoint, config=config)
        dropped = tuple(key for key in view.dropped if key not in kept)
        self._dequantised = replace(view, checkpoint=checkpoint, dropped=dropped)
        return plan_fuse(checkpoint, self.inputs, None, view.stored)

    def _plan_beside(self, kept: DequantisedCheckpoint, unreadable: UnsupportedError) -> FusePlan:
        """Return a plan that leaves quantised weights alone.

        Raises:
            UnsupportedError: `unreadable`, if an adapter changes one or finds no place.
        """
        base, options = kept.checkpoint, self.options
        if (
            options.keeps_format
            or options.trained_on is not None
            or options.dtype is not None
            or options.base_mode is not None
        ):
            raise unreadable
        try:
            plan = plan_fuse(base, self.inputs)
        except AdapterError as error:
            raise unreadable from error
        except UnsupportedError as error:
            key = error.tensor
            if key is None or key not in base.tensors or is_stored_plain(base, key):
                raise
            raise unreadable from error
        touched = [tensor.key for tensor in plan.touched if tensor.key in base.tensors]
        if not all(is_stored_plain(base, key) for key in touched):
            raise unreadable
        return plan

    def _check_mode(self) -> None:
        four_bit = bool(self._dequantised.four_bit)
        mode, path = self.options.base_mode, self._base.path
        quoted = shlex.quote(str(path))
        if mode == "original" and four_bit:
            raise OptionError(
                "the base is in four bits", path=path, hint="Give the original 16-bit base as BASE"
            )
        if mode == "dequant" and not four_bit:
            raise OptionError(
                "the base is not in four bits",
                path=path,
                hint="Leave out `base_mode`, or quantise it first: "
                f"loratools quantize {quoted} -o nf4",
            )
        if self.options.keeps_format and not self._dequantised.is_quantized:
            raise OptionError(
                "only a quantised base can be quantised again",
                path=path,
                hint="Fuse without `requantize`, then quantise: loratools quantize fused -o nf4",
            )

    def _config(self) -> Mapping[str, Any] | None:
        """Return the configuration to write, None to keep the base's file."""
        if self.options.requantize or not self._dequantised.is_quantized:
            return self.plan.config
        if self.plan.config is not None and self.options.changed_bits is not None:
            sections = self._dequantised.checkpoint.config
            return {**self.plan.config, **{k: sections[k] for k in sections if "quantiz" in k}}
        return (self.plan.config or self._dequantised.checkpoint.config) or None

    def _recorded(self) -> Mapping[str, Any]:
        options = {
            "weights": [item.weight for item in self.inputs],
            "dtype": self.options.dtype,
            "max_shard_bytes": self.options.max_shard_bytes,
            "base_mode": "dequant" if self._dequantised.four_bit else None,
            "requantize": self.options.requantize,
            "changed_bits": self.options.changed_bits,
            "trained_on": self.options.trained_on,
        }
        names = {f"adapter {i}": item.adapter for i, item in enumerate(self.inputs, 1)}
        return operation_record("fuse", names, options, self._base)

    def _parts(self) -> dict[str, NewTensor]:
        parts: dict[str, NewTensor] = {}
        for key, plan in self.plan.tensors.items():
            if key in self._verbatim:
                parts |= {part.key: part for part in self._verbatim[key].parts}
            elif key in self._encoders:
                parts |= self._reencoded(plan, self._encoders[key])
            elif self.options.requantize and key in self._dequantised.four_bit:
                parts[key] = self._requantized(plan, self._dequantised.four_bit[key])
            else:
                parts[key] = plan.source if plan.is_copy else self._made(plan)
        if self.options.keeps_format:
            of_weights = {p.key for w in self._dequantised.weights.values() for p in w.parts}
            of_running = (k for k in self._dequantised.dropped if k not in of_weights)
            parts |= {key: self._base.tensors[key] for key in of_running}
        return parts

    def _reencoded(self, plan: TensorPlan, encoder: Encoder) -> dict[str, NewTensor]:
        """Return the tensors of a changed weight: those computed, and those that stay."""
        weight = self._dequantised.weights[plan.key]
        work = Reencoded(plan, encoder, weight.shape, self._device)

        def fill(sinks: Mapping[str, Sink]) -> None:
            self._report(work.fill(sinks))

        computed = {blank.key for blank in work.blanks}
        made = {work.blanks[0].key: Made(work.blanks, fill)}
        return made | {part.key: part for part in weight.parts if part.key not in computed}

    def _requantized(self, plan: TensorPlan, weight: QuantizedWeight) -> Made:
        from loratools.operations.fuse.requantize import Requantized

        transposed = is_conv1d(plan.key, self._base.config)
        work = Requantized(plan, weight, self._device, transposed=transposed)

        def fill(sinks: Mapping[str, Sink]) -> None:
            self._report(work.fill(sinks))

        return Made(work.blanks, fill)

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
        if found.key not in self._rounded:
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
        if plan.key in self._encoders:
            return self._encoders[plan.key].scheme.short
        weight = self._dequantised.four_bit.get(plan.key) if self.options.requantize else None
        return plan.dtype.code if weight is None else weight.quant_type.upper()

    def _findings(self) -> list[Finding]:
        dropped = self._dequantised.dropped
        if self.options.keeps_format:
            changed = [self._dequantised.weights[key] for key in self._encoders]
            return [*_caveats(changed), *noise(list(self.reports.values()))]
        if not dropped:
            return []
        if self._verbatim:
            message = (
                f"changed weights are stored in 16 bits now; {len(self._verbatim)} others stay "
                "quantised as they were"
            )
            return [Finding("no-longer-quantised", "note", None, message)]
        message = (
            f"weights are stored in 16 bits now; {len(dropped)} tensors that only said how they "
            "were quantised are left out"
            if self.options.dtype != "f32"
            else f"weights are not quantised any more; {len(dropped)} tensors that only said how "
            "they were are left out"
        )
        return [
            Finding("no-longer-quantised", "note", None, message),
            *_caveats(self._dequantised.weights.values()),
        ]

    def write(
        self,
        output: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Callable[[int, int], None] | None = None,
        ready: Path | None = None,
    ) -> FuseResult:
        """Write the fused checkpoint, whole or not at all, and say what it did.

        Args:
            output: where.
            overwrite: replace an output that exists.
            progress: called with (bytes done, bytes in all).
            ready: folder that holds all weight files already; `reports` tells of them.

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
        converted = {
            key
            for key, plan in plans.items()
            if not plan.is_touched
            and key not in self._verbatim
            and (not plan.is_copy or key in self._dequantised.stored or key in self._rounded)
            and not self.options.keeps_format
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


def _caveats(weights: Iterable[CodedWeight]) -> list[Finding]:
    """Return what to know when something is added to weights of their formats."""
    caveats = {weight.caveat for weight in weights} - {""}
    return [Finding("rescaled-inputs", "warning", None, text) for text in sorted(caveats)]
