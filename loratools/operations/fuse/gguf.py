"""Fusing into a GGUF model: what llama.cpp's export-lora does, for any adapters, with a report.

Untouched tensors are copied byte for byte inside the kernel, keys too. Touched ones are decoded,
added to in float64 and stored in the type asked for, a block of rows at a time. The K and I
quantisations cannot be written again, since the gguf package makes none; their tensors become F16
or Q8_0.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from loratools.algebra.device import Computing, Device
from loratools.operations.fuse.blocks import fused_blocks, single_for_quantised
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.gguf_changes import gguf_changes
from loratools.operations.fuse.gguf_diffusion import diffusion_changes, is_of_diffusion
from loratools.operations.fuse.loss import lost_to_rounding, refuse_erased, refuse_rounded
from loratools.operations.fuse.operation import refuse_nothing
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.result import FusePreview, FuseResult
from loratools.operations.fuse.tensor import (
    SquaresOfProducts,
    TensorReport,
    are_products,
    fuse_tensor,
    measured,
    squared_norm,
)
from loratools.operations.fuse.terms import View, WeightedChange, load_terms
from loratools.operations.reported import report
from loratools.work.call import kept
from loratools.work.declared import option
from loratools.work.parallel import in_order
from loratools.work.provenance import operation_record, weight_files
from loratools.work.requests import Progress
from loratools.work.spellings import dtype as dtype_name
from loratools_formats.checkpoints.shards import check_space
from loratools_formats.containers.gguf.container import GgufTensor
from loratools_formats.containers.gguf.ggml_types import BY_NAME, GgmlType, decode, encode
from loratools_formats.containers.gguf.model import ModelLayout, decoded
from loratools_formats.containers.gguf.splits import GgufModel
from loratools_formats.contract.files import check_target
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import OptionError, OutputExistsError
from loratools_formats.disk.files import create, write_at
from loratools_formats.disk.provenance import (
    PREDICATE_TYPE,
    PROVENANCE_FILE,
    start_digest,
    statement_of_one,
)
from loratools_formats.disk.publish import publish_with, resolved

Outtype = Literal["keep", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
Fallback = Literal["f16", "q8_0"]
_ENCODED = frozenset(name.upper() for name in get_args(Outtype)[1:])


@dataclass(frozen=True)
class GgufFuseOptions(Computing):
    """How to fuse into a GGUF model.

    Attributes:
        outtype: type of the tensors that change; `keep` leaves each its own.
        fallback: type of changed tensors whose own type cannot be written, such as Q4_K: f16 by
            default, or q8_0. Rows that do not fit q8_0 become f16.
        allow_lossy: write even if less than half of the change survives rounding.

    Raises:
        OptionError: no such type, or the number of threads is out of range.
    """

    outtype: Outtype = "keep"
    fallback: Fallback | None = option(None, heading="Computing", parse=dtype_name)
    allow_lossy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outtype not in get_args(Outtype):
            expected = " or ".join(get_args(Outtype))
            raise OptionError("there is no such type", got=self.outtype, expected=expected)


class GgufFusion:
    """A planned fusion, ready to be written.

    Args:
        base: the model.
        inputs: adapters with their weights.
        options: how.

    Raises:
        UnsupportedError: an adapter has no true ΔW, or something llama.cpp has no tensor for.
        AdapterError: a module does not fit the model.
    """

    def __init__(
        self, base: GgufModel, inputs: Sequence[FuseInput], options: GgufFuseOptions
    ) -> None:
        self.base, self.options = base, options
        self._recorded = kept(self._record)
        self.inputs = tuple(inputs)
        changes: dict[str, list[WeightedChange]] = {}
        told: tuple[Finding, ...] = ()
        if is_of_diffusion(base, inputs):
            changes, told = diffusion_changes(base, inputs)
        else:
            for item in inputs:
                for name, change in gguf_changes(item, base):
                    changes.setdefault(name, []).append(change)
        kinds = {name: _kind(base.tensors[name], options) for name in changes}
        self.layout = ModelLayout(base, kinds)
        self.plans = {
            name: self._plan(name, changes[name]) for name in base.tensors if name in changes
        }
        refuse_nothing(self.plans.values(), self.inputs)
        touched = [base.tensors[name] for name in self.plans]
        read = dict.fromkeys(notice for item in inputs for notice in item.adapter.notices)
        self.findings = (*read, *told, *_fallbacks(touched, kinds, options), *_joined(base))

    def _plan(self, name: str, changes: Sequence[WeightedChange]) -> TensorPlan:
        source = decoded(self.base.tensors[name])
        kind = self.layout.kinds[name]
        dtype = DTYPES[kind.name if kind.is_float else "F32"]
        return TensorPlan(name, source, dtype, tuple(changes), original=source)

    @property
    def preview(self) -> FusePreview:
        """What would be written."""
        kinds = {name: self.layout.kinds[name].name for name in self.plans}
        return FusePreview(
            tuple(self.plans.values()),
            kinds,
            len(self.base.tensors),
            self.layout.nbytes,
            1,
            self.findings,
        )

    def write(
        self,
        output: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> FuseResult:
        """Write the fused model, whole or not at all, and say what it did.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false, or it is a part of the
                model.
            OutputError: not enough space, or writing failed; nothing was changed.
            AdapterError: values are not finite, or an input changed meanwhile.
            UnsupportedError: quantising erases most of the change, and that was not allowed.
        """
        check_target(output, self._sources(), overwrite=overwrite)
        self._refuse_part(output)
        check_space(resolved(output).parent, self.layout.nbytes)
        marks = {PROVENANCE_FILE: PREDICATE_TYPE.encode()}
        with publish_with(output, marks, overwrite=overwrite) as (temporary, beside):
            reports = self._fill(temporary, progress)
            refuse_erased(
                reports,
                self.base.path,
                what="quantised types",
                hint="Choose a wider `dtype` such as f16, or pass `allow_lossy=True`",
                allow_lossy=self.options.allow_lossy,
            )
            refuse_rounded(reports, self.base.path, allow_lossy=self.options.allow_lossy)
            self.layout.check_written(temporary)
            self._check_unchanged()
            nbytes_in = sum(part.file.nbytes for part in self.base.parts)
            told = report(lost_to_rounding(reports), self.layout.nbytes, nbytes_in)
            beside[PROVENANCE_FILE] += statement_of_one(
                {**self._recorded(), "report": told},
                Path(output),
                temporary,
                lambda place: start_digest(place, self.layout.data_start),
            )
        return FuseResult(
            tensors=reports,
            copied=len(self.base.tensors) - len(self.plans),
            converted=0,
            nbytes=self.layout.nbytes,
            shards=(Path(output).name,),
            findings=self.findings,
            left_out=(),
        )

    def _refuse_part(self, output: str | os.PathLike[str]) -> None:
        """Refuse to replace one part of a split model, which would ruin the others."""
        parts = {Path(os.path.realpath(part.file.path)) for part in self.base.parts}
        if len(parts) > 1 and resolved(output) in parts:
            raise OutputExistsError(
                "the output is one part of the model to fuse into",
                path=output,
                hint="Choose another name",
            )

    def _sources(self) -> list[Path]:
        given = [item.adapter.source for item in self.inputs]
        parts = [part.file.path for part in self.base.parts]
        return [*parts, *(path for path in given if path is not None)]

    def _check_unchanged(self) -> None:
        self.base.check_unchanged()
        for item in self.inputs:
            item.adapter.check_unchanged()

    def _record(self) -> dict[str, Any]:
        names = {f"adapter {i}": item.adapter for i, item in enumerate(self.inputs, 1)}
        weights = [item.weight for item in self.inputs]
        parts = list(
            weight_files(
                "base",
                [
                    (part.file, start_digest(part.file.path, part.data_start))
                    for part in self.base.parts
                ],
            )
        )
        return operation_record(
            "fuse",
            names,
            {
                "weights": weights,
                "outtype": self.options.outtype,
                "fallback": self.options.fallback or "f16",
            },
            others=parts,
        )

    def _fill(self, path: Path, progress: Progress | None) -> tuple[TensorReport, ...]:
        device = Device(self.options.device)
        out = create(path)
        reports, done = [], 0
        try:
            self.layout.write_header(out)

            def one(name: str) -> TensorReport | None:
                if name in self.plans:
                    return self._fused(self.plans[name], device, out)
                self.layout.copy_tensor(name, out)
                return None

            names = list(self.base.tensors)
            for name, found in zip(names, in_order(one, names, self.options.workers), strict=True):
                if found is not None:
                    reports.append(found)
                done += self.layout.kinds[name].nbytes(self.base.tensors[name].shape)
                if progress is not None:
                    progress(done, self.layout.nbytes)
        finally:
            os.close(out)
        return tuple(reports)

    def _fused(self, plan: TensorPlan, device: Device, out: int) -> TensorReport:
        offset = self.layout.offsets[plan.key]
        kind = self.layout.kinds[plan.key]

        def store(start: int, values: Array) -> None:
            place = offset + start // kind.block * kind.block_nbytes
            write_at(out, place, memoryview(values.reshape(-1).view(np.uint8).data))

        if kind.is_float:
            return fuse_tensor(plan, device, store)
        return quantised(plan, kind, device, store)


@np.errstate(over="ignore", invalid="ignore")
def quantised(
    plan: TensorPlan, kind: GgmlType, device: Device, store: Callable[[int, Array], None]
) -> TensorReport:
    """Compute a tensor block by block, quantise it, and measure what of the change survives.

    Args:
        plan: the tensor.
        kind: type to store.
        device: where products are computed.
        store: called with the first element's index and the bytes of a block, in order.

    Raises:
        AdapterError: NaN or infinite values in the base, or values beyond the type.
    """
    view = View.of(plan.source.shape, plan.changes)
    terms = load_terms(plan.changes, view)
    squares = SquaresOfProducts(terms, view) if are_products(terms) else None
    base, delta, lost, gained = 0.0, 0.0, 0.0, 0.0
    single = single_for_quantised(view, terms)
    blocks = fused_blocks(plan.source, view, terms, plan.patches, single=single, device=device)
    for block in blocks:
        w, total = block.base.reshape(-1), block.total.reshape(-1)
        stored = encode(total, kind)
        store(block.start, stored)
        base += squared_norm(w)
        change = np.subtract(total, w, out=w)
        delta += squared_norm(change) if squares is None else squares.of(block)
        error = np.subtract(decode(stored.data, kind, total.shape), total, out=total)
        lost += squared_norm(error)
        gained += float(np.dot(error, change))
    found = measured(plan, kind.name, (base, delta, lost))
    return replace(found, surviving=1.0 + gained / delta if delta else 1.0)


def _wanted(tensor: GgufTensor, options: GgufFuseOptions) -> GgmlType:
    return tensor.kind if options.outtype == "keep" else BY_NAME[options.outtype.upper()]


def _kind(tensor: GgufTensor, options: GgufFuseOptions) -> GgmlType:
    """Return the type to store a changed tensor in: the first that can be written."""
    for kind in (_wanted(tensor, options), BY_NAME[(options.fallback or "f16").upper()]):
        if kind.name in _ENCODED and tensor.shape[-1] % kind.block == 0:
            return kind
    return BY_NAME["F16"]


def _fallbacks(
    tensors: Sequence[GgufTensor], kinds: Mapping[str, GgmlType], options: GgufFuseOptions
) -> list[Finding]:
    """Return a finding for each type that became another than the one asked for."""
    found = Counter((t.kind.name, _wanted(t, options).name, kinds[t.name].name) for t in tensors)
    findings = []
    for (old, wanted, new), count in sorted(found.items()):
        if new != wanted:
            reason = (
                f"their rows are no whole blocks of {wanted}"
                if wanted in _ENCODED
                else f"{wanted} cannot be written again"
            )
            many = "s" * (count > 1)
            message = f"{count} tensor{many} of type {old} became {new}, since {reason}"
            findings.append(Finding("type-fallback", "note", None, message))
    return findings


def _joined(base: GgufModel) -> list[Finding]:
    message = f"the {len(base.parts)} parts of the model became one file"
    return [Finding("parts-joined", "note", None, message)] if len(base.parts) > 1 else []
