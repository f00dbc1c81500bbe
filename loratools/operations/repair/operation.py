"""Repairs an adapter: shrinks intruder dimensions, drops dead modules, rebalances factors.

Intruder dimensions: singular values σⱼ of W + ΔW whose left vectors are far from all of W's (see
`algebra.intruders`) become λσⱼ, by the rank-one edits ΔW − (1 − λ) Σ σⱼ uⱼ vⱼᵀ, then brought to the
module's rank with the least error. Source: arXiv 2410.21228, §6; PEFT's `reduce_intruder_dimension`
does it with two dense SVDs for each layer of a live model.

A DoRA's direction takes the edits over its gains, and its magnitudes become the norms of what comes
out (`folding.dora_edits`).

Balancing moves a power of two from one factor to the other, which rounds nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loratools.algebra.device import Device
from loratools.algebra.intruders import Leading
from loratools.algebra.median import median
from loratools.algebra.one_matrix import Decomposed, Matrix
from loratools.algebra.outliers import DEAD, ONE_SIDED
from loratools.algebra.thin import Thin
from loratools.base.decompositions import leading, leading_of_merged
from loratools.folding.base_layout import has_own_layout
from loratools.folding.dora import finite_vector
from loratools.folding.dora_edits import DoraWeight, edited_dora
from loratools.folding.expert_sides import straightened, turned_back, with_sides
from loratools.folding.thin_modules import ThinModule, ThinModules
from loratools.folding.weights_beside import WeightsBeside
from loratools.folding.without_base import folded_exactly
from loratools.lowrank.matrices import loaded
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions, Resizer
from loratools.operations.repair.result import RepairOptions, RepairReport, RepairResult
from loratools.operations.reported import ratio
from loratools.work.parallel import done_in_order
from loratools.work.provenance import operation_record, record_metadata
from loratools.work.requests import Progress
from loratools.work.scratch import Scratch
from loratools.work.selection import Selection, require_selected
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import Array, encode
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError
from loratools_formats.disk.provenance import with_record


@dataclass(frozen=True)
class _Outcome:
    """One module after its repair; the change is None if it was dropped.

    Attributes:
        is_measured: whether its norm is known: a DoRA's is not without the base.
    """

    change: ModuleChange | None
    report: RepairReport
    squared_norm: float
    squared_change: float
    squared_intended: float
    squared_error: float
    is_measured: bool = True


def repair(
    adapter: Adapter,
    options: RepairOptions,
    *,
    base: Checkpoint | None = None,
    compute: ComputeOptions | None = None,
    selection: Selection | None = None,
    workers: int = 2,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> RepairResult:
    """Repair an adapter.

    Args:
        adapter: LoRA or DoRA, or of a kind that folds exactly without the base.
        options: what to repair.
        base: the base model, for intruder dimensions.
        compute: how to compute and store.
        selection: modules to touch; the others keep every bit.
        workers: threads over modules; results do not depend on it.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: intruder dimensions are asked for without a base.
        UnsupportedError: a module has no factors, or is a DoRA with magnitudes of inputs.
        AdapterError: NaN or infinite values, nothing selected, or every module is dead.
    """
    if not options.keep_intruders and base is None:
        raise OptionError(
            "intruder dimensions show only beside the base model",
            hint="Pass `base=MODEL`, or `keep_intruders=True` for the other steps",
        )
    if not options.keep_intruders and has_own_layout(adapter):
        raise UnsupportedError(
            f"modules of format {adapter.format} do not lie as in the base model",
            path=adapter.source,
            hint="Convert it first, and back afterwards: "
            + command_on(adapter, "convert", "--to", "peft", "--base", "MODEL", output="peft"),
        )
    adapter.require_true_delta("repair")
    lying = with_sides(folded_exactly(adapter, "repair", scratch_folder, base), base)
    adapter = straightened(lying)  # intruders are directions of outputs
    for name, delta in adapter.modules.items():
        direction = delta.factors
        if delta.is_dora and (
            direction is None or direction.layer.kind == "experts" or delta.axis != "output"
        ):
            raise UnsupportedError(
                "a DoRA is repaired if it has factors, and a magnitude for each output",
                path=adapter.source,
                tensor=name,
                hint="Make it a plain LoRA first: "
                + command_on(adapter, "to-lora", "--base MODEL", "--rank RANK"),
            )
    work = _Repair(adapter, options, base, compute or ComputeOptions(), scratch_folder)
    selection = selection or Selection()
    require_selected(selection, adapter.modules, "repair", adapter.source)

    def one(name: str) -> _Outcome:
        return work.one(name, touched=name in selection)

    outcomes = done_in_order(one, adapter.modules, workers, progress)
    outcomes = work.without_dead(outcomes, selection)
    record = options.record() | selection.record()
    if work.compute.dtype is not None:
        record["dtype"] = work.compute.dtype
    provenance = operation_record("repair", {"adapter": adapter}, record, base)
    kept = {o.report.name: o.change for o in outcomes if o.change is not None}
    if not kept:
        raise AdapterError("every module is dead, and nothing would be left", path=adapter.source)
    total = sum(o.squared_norm for o in outcomes)
    intended = sum(o.squared_intended for o in outcomes)
    repaired = replace(
        turned_back(replace(adapter, modules=kept), lying),
        metadata=with_record(adapter.metadata, record_metadata(provenance)),
        provenance=provenance,
    )
    return RepairResult(
        adapter=repaired,
        modules=tuple(outcome.report for outcome in outcomes),
        change=ratio(sum(o.squared_change for o in outcomes), total),
        relative_error=ratio(sum(o.squared_error for o in outcomes), intended),
    )


class _Repair:
    """One run: what its modules share."""

    def __init__(
        self,
        adapter: Adapter,
        options: RepairOptions,
        base: Checkpoint | None,
        compute: ComputeOptions,
        scratch_folder: Path | None,
    ) -> None:
        self.options = options
        self.compute = compute
        self._opener = ThinModules(adapter, base, "repair")
        has_dora = any(change.is_dora for change in adapter.modules.values())
        needed = has_dora or not options.keep_intruders
        self._beside = WeightsBeside(adapter, base) if base is not None and needed else None
        # Modules that are left alone keep their scales, and a format may want one for all.
        kept = replace(compute, keep_alpha=True)
        self._resizer = Resizer(kept, Scratch(scratch_folder), one_scale=False)
        self._device = Device(compute.device)

    def one(self, name: str, *, touched: bool) -> _Outcome:
        """Return a module with its intruders shrunk and its factors balanced."""
        change = self._opener.adapter.modules[name]
        delta = change.require_factors()
        report = RepairReport(name, "kept", delta.rank, delta.rank, 0, 0, 0.0, 0.0)
        if change.is_dora and self._beside is not None:
            kept = self._dora(report, change, self._beside.load(name, change)[0], touched=touched)
        else:
            module = self._opener.open(name)
            squared = sum(thin.squared_norm for thin in module.matrices)
            measured = not change.is_dora
            kept = _Outcome(change, report, squared, 0.0, squared, 0.0, measured)
            shrinks = touched and squared > 0.0 and not self.options.keep_intruders
            if shrinks and self._beside is not None:
                kept = self._shrunk(kept, module, delta, self._beside.load(name, change))
        return self._balanced(kept) if touched and self.options.rebalance else kept

    def _dora(
        self, report: RepairReport, change: ModuleChange, weight: Array, *, touched: bool
    ) -> _Outcome:
        delta, magnitude = change.require_factors(), change.magnitude
        assert magnitude is not None
        ((b, a),) = loaded(delta)
        values = finite_vector(magnitude, "magnitude")
        direction = delta.scale * (b.astype(np.float64) @ a)
        if not np.isfinite(direction).all():
            raise AdapterError(NOT_FINITE, tensor=report.name)
        dora = DoraWeight(weight, direction, values)
        merged = dora.merged
        squared = float(np.sum((merged - weight) ** 2))
        kept = _Outcome(change, report, squared, 0.0, squared, 0.0)
        if not touched or self.options.keep_intruders or not squared:
            return kept
        found, _ = leading_of_merged(weight, merged, self.options.intruders)
        report = replace(report, undetermined=found.verdicts.count("undetermined"))
        if not found.intruders:
            return replace(kept, report=report)
        rank = self._rank_after(delta, [found])
        left = (self.options.shrink - 1.0) * found.u[:, found.intruders] * found.s[found.intruders]
        left[~merged.any(axis=1)] = 0.0
        edits = left, found.vt[found.intruders]
        done = edited_dora(report.name, change, dora, edits, rank, self._resizer)
        moved = float(np.sum(left**2))
        report = replace(
            report,
            action="shrunk",
            rank_out=rank,
            intruders=len(found.intruders),
            change=ratio(moved, squared),
            relative_error=ratio(done.squared_error, done.squared_intended),
        )
        return _Outcome(
            done.change, report, squared, moved, done.squared_intended, done.squared_error
        )

    def _rank_after(self, delta: LowRank, found: list[Leading]) -> int:
        """Return the rank that a module has after its edits."""
        if not self.options.keep_every_rank:
            return delta.rank
        return min(delta.rank + max(len(one.intruders) for one in found), *delta.shape)

    def _shrunk(
        self, kept: _Outcome, module: ThinModule, delta: LowRank, weights: list[Array]
    ) -> _Outcome:
        found = [
            leading(weight, thin, self.options.intruders)[0]
            for weight, thin in zip(weights, module.matrices, strict=True)
        ]
        count = sum(len(one.intruders) for one in found)
        open_ = sum(one.verdicts.count("undetermined") for one in found)
        report = replace(kept.report, undetermined=open_)
        if not count:
            return replace(kept, report=report)
        parts: list[Decomposed] = [
            self._edited(thin, one) for thin, one in zip(module.matrices, found, strict=True)
        ]
        rank = self._rank_after(delta, found)
        like = PlannedFactors.like(delta)
        if like.alpha is None:
            like = replace(like, alpha=delta.scale * delta.rank)
        done = self._resizer.compressed(module.name, like, parts, rank)
        new = replace(done.delta, alpha=None) if delta.alpha is None else done.delta
        factor = 1.0 - self.options.shrink
        change = factor**2 * sum(float(np.sum(one.s[one.intruders] ** 2)) for one in found)
        intended = sum(part.squared_norm for part in parts)
        report = replace(
            report,
            action="shrunk",
            rank_out=rank,
            intruders=count,
            change=ratio(change, kept.squared_norm),
            relative_error=ratio(done.squared_error, intended),
        )
        return _Outcome(
            ModuleChange(new), report, kept.squared_norm, change, intended, done.squared_error
        )

    def _edited(self, thin: Thin, found: Leading) -> Matrix:
        """Return ΔW − (1 − λ) Σ σⱼ uⱼ vⱼᵀ, of rank r + the number of intruders."""
        which = found.intruders
        edits = (self.options.shrink - 1.0) * found.u[:, which] * found.s[which]
        b = np.concatenate([thin.scale * thin.b.astype(np.float64), edits], axis=1)
        a = np.concatenate([thin.a.astype(np.float64), found.vt[which]])
        return Matrix(b, a, 1.0, self._device, use_gram=False)

    def _balanced(self, done: _Outcome) -> _Outcome:
        """Move a power of two between the factors, if they are one-sided and no value is lost."""
        assert done.change is not None
        delta = done.change.require_factors()
        b, a = delta.b.load(np.float64), delta.a.load(np.float64)
        size_b, size_a = float(np.linalg.norm(b)), float(np.linalg.norm(a))
        if not size_b or not size_a or 1.0 / ONE_SIDED <= size_b / size_a <= ONE_SIDED:
            return done
        power = round(math.log2(size_b / size_a) / 2.0)
        new = {"b": np.ldexp(b, -power), "a": np.ldexp(a, power)}
        types = {"b": delta.b.dtype, "a": delta.a.dtype}
        stored = {side: encode(values, types[side]) for side, values in new.items()}
        if any(not np.array_equal(stored[s].astype(np.float64), new[s]) for s in new):
            return done
        scratch = self._resizer.scratch
        balanced = replace(
            delta,
            b=scratch.store(delta.b.key, stored["b"], types["b"]),
            a=scratch.store(delta.a.key, stored["a"], types["a"]),
        )
        action = "rebalanced" if done.report.action == "kept" else "shrunk, rebalanced"
        report = replace(done.report, action=action, balance=size_b / size_a)
        return replace(done, change=done.change.with_direction(balanced), report=report)

    def without_dead(self, outcomes: list[_Outcome], selection: Selection) -> list[_Outcome]:
        """Return the outcomes with dead modules dropped, which counts as error."""
        if not self.options.drop_dead:
            return outcomes
        sizes = [math.sqrt(o.squared_norm) for o in outcomes if o.is_measured]
        limit = DEAD * median(sizes) if sizes else 0.0
        return [
            _dropped(one)
            if one.is_measured
            and math.sqrt(one.squared_norm) <= limit
            and one.report.name in selection
            else one
            for one in outcomes
        ]


def _dropped(outcome: _Outcome) -> _Outcome:
    squared = outcome.squared_norm
    report = replace(
        outcome.report,
        action="dropped",
        rank_out=0,
        change=1.0 if squared else 0.0,
        relative_error=0.0,
    )
    return _Outcome(None, report, squared, squared, 0.0, 0.0)
