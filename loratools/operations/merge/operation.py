"""Merging adapters: align, merge every module, choose ranks, write factors, measure the error.

The error reported is that of the stored factors against what the method defines, before any
truncation or rounding. Modules are independent, so memory is bounded by the largest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loratools.algebra.device import Device
from loratools.algebra.ranks import Spectrum
from loratools.base.placement.names import Names
from loratools.folding.base_seen import seen_by
from loratools.folding.without_base import folded_exactly
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.rescale import of_positive_scale
from loratools.lowrank.resize import Resizer
from loratools.operations.common_alpha import common_alpha
from loratools.operations.merge.align import AlignedModule, MergeInput, align
from loratools.operations.merge.exact import (
    factor_residual,
    joined_exactly,
    joined_form,
    merged_bias,
)
from loratools.operations.merge.extras import (
    agreed_carried,
    agreed_replacements,
    merged_additions,
    refuse_replaced_modules,
)
from loratools.operations.merge.fit import check_fit
from loratools.operations.merge.formats import in_one_format
from loratools.operations.merge.methods import Method, get_method
from loratools.operations.merge.module import MergedModule, ModuleMethod, merged_module
from loratools.operations.merge.naming import in_one_naming
from loratools.operations.merge.options import MergeOptions
from loratools.operations.merge.result import MergeModuleReport, MergeResult
from loratools.operations.merge.spellings import in_one_spelling
from loratools.operations.merge.trim import SharedTrim
from loratools.operations.merge.weightless import (
    heard,
    nothing_left,
    weights_of,
    without_weight,
)
from loratools.operations.merge.whole import (
    MergedWhole,
    is_whole,
    merged_whole,
    refuse_unasked,
    whole_modules,
)
from loratools.operations.one_rank import groups_of_one_rank
from loratools.operations.ranked import Measured, Outcome, Ranked, share
from loratools.operations.reported import ratio
from loratools.work.provenance import operation_record
from loratools.work.regexes import is_found
from loratools.work.requests import Progress
from loratools.work.scratch import Scratch
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import Array, common_dtype
from loratools_formats.core.file_names import CARD
from loratools_formats.core.metadata import merged_from

_OVERSAMPLE = 10


@dataclass(frozen=True)
class _Merged(Outcome):
    report: MergeModuleReport
    kept: float
    squared_residual: float | None


def merge(
    inputs: Sequence[MergeInput],
    options: MergeOptions,
    *,
    base: Checkpoint | None = None,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters into one.

    Args:
        inputs: adapters and weights, in order; the first gives the format and the settings.
        options: what to do.
        base: the base model, needed where a DoRA takes part.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: options that do not fit the method, each other, or the adapters.
        AdapterError: adapters that do not fit together, or NaN and infinite values.
        UnsupportedError: an adapter whose factors do not tell its ΔW, a DoRA without its base, or
            biases of factors in a method that is not a weighted sum.
    """
    method = get_method(options.method)
    options = replace(options, parameters=method.checked(options.parameters))
    inputs, dropped = without_weight(inputs, options)
    inputs = in_one_naming([_folded(item, scratch_folder) for item in inputs])
    named, inputs = inputs, in_one_spelling(in_one_format(inputs, base), base)
    pairs = [(x.adapter.findings, y.adapter.findings) for x, y in zip(named, inputs, strict=True)]
    told = tuple(each for before, after in pairs for each in after[len(before) :])
    check_fit(inputs, options, method)
    others, wholes = whole_modules(inputs)
    modules = align(
        inputs,
        force_base=options.force_base,
        allow_missing=options.allow_missing,
        leave={module.name for module in wholes},
    )
    modules, silent = heard(modules, others, options, has_others=bool(wholes))
    refuse_replaced_modules(inputs)
    work = _Merge(inputs, options, method, modules, wholes, base, scratch_folder)
    silent = tuple(sorted({*dropped, *silent, *work.whole_silent}))

    def record() -> dict[str, Any]:
        adapters = {f"{index}": item.adapter for index, item in enumerate(inputs)}
        values = options.record() | {"weights": [item.weight for item in inputs]}
        return operation_record("merge", adapters, values)

    done = work.run(record, progress)
    residuals = [outcome.squared_residual for outcome in done.outcomes]
    known = [residual for residual in residuals if residual is not None]
    squared_norm = done.squared_norm + sum(each.squared_norm for each in work.whole)
    lost = sum(each.squared_error for each in done.outcomes)
    lost += sum(each.squared_error for each in work.whole)
    kept = squared_norm - done.squared_norm + sum(outcome.kept for outcome in done.outcomes)
    reports = [*(outcome.report for outcome in done.outcomes), *map(_of_whole, work.whole)]
    return MergeResult(
        work.finished(done.modules, done.record),
        tuple(sorted(reports, key=lambda report: report.name)),
        share(kept, squared_norm),
        ratio(lost, squared_norm),
        ratio(sum(known), squared_norm) if len(known) == len(residuals) else None,
        silent,
        told,
    )


def _of_whole(merged: MergedWhole) -> MergeModuleReport:
    error = ratio(merged.squared_error, merged.squared_norm)
    return MergeModuleReport(merged.name, merged.ranks_in, None, 1.0, error, merged.absent)


def _folded(item: MergeInput, scratch_folder: Path | None) -> MergeInput:
    """Return an input whose kinds are folded into factors, exactly, with scales above 0."""
    adapter = folded_exactly(item.adapter, "merge", scratch_folder, keeps=is_whole)
    modules = {name: of_positive_scale(delta) for name, delta in adapter.modules.items()}
    return replace(item, adapter=replace(adapter, modules=modules))


def _config(first: Adapter, inputs: Sequence[MergeInput]) -> Any:
    return get_format(first.format).merged_config([item.adapter for item in inputs])


class _Merge(Ranked[_Merged, Measured]):
    """One run: what all its modules share."""

    def __init__(
        self,
        inputs: Sequence[MergeInput],
        options: MergeOptions,
        method: Method,
        modules: list[AlignedModule],
        wholes: Sequence[AlignedModule],
        base: Checkpoint | None,
        scratch_folder: Path | None,
    ) -> None:
        self.inputs = inputs
        self.merge_options = options
        self.method = method
        self.modules = {module.name: module for module in modules}
        seen = [] if base is None else [seen_by(item.adapter, base) for item in inputs]
        self.in_base = {name: own for each in seen for name, own in each.names.items()}
        tensors = {key: t for each in seen for key, t in each.checkpoint.tensors.items()}
        self.base = Names(replace(seen[0].checkpoint, tensors=tensors)) if seen else None
        self.folder = scratch_folder
        self.device = Device(options.compute.device)
        self.trim = None
        settings = [options.parameters, *(override.parameters for override in options.overrides)]
        is_paper = any(each.get("flavor") == "paper" for each in settings)
        if method.name == "ties" and is_paper and options.space == "full":
            self.trim = SharedTrim(modules)
        self.whole, self.whole_silent = self._merged_whole(wholes, Scratch(scratch_folder))
        if not modules and not self.whole:
            raise nothing_left()
        self._around = self._without_modules()
        parts = {module.name: module.first for module in modules}
        alike = common_alpha(self._around.format, parts, options.rule, options.compute)
        super().__init__(
            list(self.modules),
            options.rule,
            Resizer(options.compute, Scratch(scratch_folder), options.rule.uniform, alike),
            input_nbytes=sum(item.adapter.weights_nbytes for item in inputs),
            groups=groups_of_one_rank(
                {module.name: module.first.layer for module in modules}, self._around.format
            ),
        )

    def _without_modules(self) -> Adapter:
        """Return all of the merged adapter but its modules."""
        first = self.inputs[0].adapter
        titles = merged_from(item.adapter.metadata for item in self.inputs)
        return replace(
            first,
            modules={},
            additions=merged_additions(self.inputs, self.coefficients),
            replacements=agreed_replacements(self.inputs, self.merge_options.replacements),
            carried=agreed_carried(self.inputs, self.merge_options.replacements),
            config=_config(first, self.inputs),
            # The first adapter's card does not describe the result.
            attachments={k: v for k, v in first.attachments.items() if k != CARD},
            metadata={**first.metadata, **titles},
            inputs=tuple(file for item in self.inputs for file in item.adapter.inputs),
        )

    def _merged_whole(
        self, wholes: Sequence[AlignedModule], scratch: Scratch
    ) -> tuple[list[MergedWhole], list[str]]:
        """Return the full differences of the result, and the modules without any weight."""
        if not wholes:
            return [], []
        if self.coefficients is None:
            refuse_unasked(wholes, self.method.name)
            return [], []
        done = [merged_whole(module, self.coefficients, scratch) for module in wholes]
        return [m for m in done if m.change is not None], [m.name for m in done if not m.change]

    def adapter(self, modules: Mapping[str, ModuleChange]) -> Adapter:
        whole = {each.name: each.change for each in self.whole if each.change is not None}
        return replace(self._around, modules=dict(sorted({**modules, **whole}.items())))

    @property
    def coefficients(self) -> Callable[[str, Array], Array] | None:
        """Coefficients from a name and inner products; None if the method is no weighted sum."""
        if self.method.kind != "span":
            wanted = self.merge_options.linear_differences
            return (lambda name, _: self._weights(name)) if wanted else None
        function = self.method.function
        return lambda name, gram: np.asarray(
            function(gram, self._weights(name), **self._parameters(name))
        )

    def _weights(self, name: str) -> Array:
        return weights_of(name, self.inputs, self.merge_options)

    def _parameters(self, name: str) -> dict[str, Any]:
        for override in self.merge_options.overrides:
            if override.parameters and is_found(override.match, name):
                return self.merge_options.parameters | self.method.checked(override.parameters)
        return self.merge_options.parameters

    def _width(self, module: AlignedModule) -> int:
        """Return how many triplets a streamed SVD looks for: the highest rank, and some more."""
        return min(self._highest(module) + _OVERSAMPLE, *module.first.shape)

    def _highest(self, module: AlignedModule) -> int:
        rule = self.rule
        for pattern, rank in rule.patterns:
            if is_found(pattern, module.name):
                return rank
        ranks = [d.require_factors().rank for d in module.deltas if d is not None]
        if rule.rank is not None:
            return rule.rank
        if rule.max_rank is not None:
            return rule.max_rank
        return sum(ranks) if rule.is_given else max(ranks)

    def _merged(self, module: AlignedModule) -> MergedModule:
        run = ModuleMethod(
            self.method,
            self._parameters(module.name),
            self._weights(module.name),
            self.merge_options.space,
            self.options.seed,
            self.options.power_iterations,
            self._width,
            None if self.trim is None else self.trim.threshold,
        )
        in_base = self.in_base.get(module.name)
        return merged_module(module, run, self.base, self.folder, self.device, in_base)

    def _planned_factors(self, module: AlignedModule, merged: MergedModule) -> PlannedFactors:
        """Return the plan of the result, which says how to store it."""
        first = module.first
        parts = [delta.require_factors() for delta in module.deltas if delta is not None]
        dtype = common_dtype([tensor.dtype for part in parts for tensor in (part.a, part.b)])
        like = replace(PlannedFactors.like(first), bias=merged_bias(module, merged))
        return like.resized(first.rank, dtype, dtype, 1.0)

    def measured(self, name: str) -> Measured:
        module = self.modules[name]
        merged = self._merged(module)
        planned = self._planned_factors(module, merged)
        form = joined_form(module, merged)
        if form is not None:  # whose scale may have to stay
            rank, scale = form
            planned = planned.resized(rank, planned.a.dtype, planned.b.dtype, scale)
        return Measured(self._spectrum(module, merged), planned)

    def _spectrum(self, module: AlignedModule, merged: MergedModule) -> Spectrum:
        highest = min(self._highest(module), *module.first.shape)
        rows = []
        for matrix in merged.matrices:
            found = (
                matrix.singular_values[:highest]
                if self._is_streamed(merged)
                else (matrix.singular_values[: min(module.first.shape)])
            )
            rows.append(found)
        width = max(len(row) for row in rows)
        stacked = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
        tail = np.array([m.squared_norm for m in merged.matrices]) - (stacked**2).sum(axis=1)
        planned = self._planned_factors(module, merged)
        out, in_ = module.first.shape
        stored = self.options.stored
        bits = in_ * stored(planned.a).bits + out * stored(planned.b).bits
        return Spectrum(
            module.name,
            module.first.shape,
            stacked,
            width,
            module.first.experts * bits // 8,
            np.maximum(tail, 0.0) if self._is_streamed(merged) else None,
        )

    def _is_streamed(self, merged: MergedModule) -> bool:
        return (
            merged.pairs is None
            and self.method.kind != "core"
            and self.merge_options.space == "full"
        )

    def outcome(self, name: str, ranks: Mapping[str, int] | None) -> _Merged:
        module = self.modules[name]
        merged = self._merged(module)
        spectrum = self._spectrum(module, merged)
        planned = self._planned_factors(module, merged)
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name where it matters
            new, squared_error = self._stored(module, merged, spectrum, planned, ranks)
        squared_norm = sum(matrix.squared_norm for matrix in merged.matrices)
        kept = min(float(spectrum.energies[: new.rank].sum()), squared_norm)
        report = MergeModuleReport(
            name,
            tuple(None if d is None else d.require_factors().rank for d in module.deltas),
            new.rank,
            share(kept, squared_norm),
            ratio(squared_error, squared_norm),
            module.absent,
        )
        residual = factor_residual(merged, module) if self.method.name == "fedex" else None
        return _Merged(name, ModuleChange(new), squared_error, squared_norm, report, kept, residual)

    def _stored(
        self,
        module: AlignedModule,
        merged: MergedModule,
        spectrum: Spectrum,
        planned: PlannedFactors,
        ranks: Mapping[str, int] | None,
    ) -> tuple[LowRank, float]:
        rule = self.rule
        if ranks is not None:
            rank = ranks[module.name]
        elif rule.is_given:
            rank = rule.of_module(spectrum)
        else:
            rank = spectrum.rank
        exact = joined_exactly(module, merged, planned) if rank >= spectrum.rank else None
        if exact is not None:
            free = ranks is None and not rule.is_given
            kept = self.resizer.without_loss(exact, exact.rank if free else rank)
            if kept is not None:
                return kept, 0.0
        found = self.resizer.compressed(module.name, planned, merged.matrices, rank)
        return found.delta, found.squared_error
