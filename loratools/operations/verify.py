"""Whether a fused checkpoint contains an adapter, tensor by tensor.

What fusing would make is computed again from the base and the adapters, block by block, and
compared with the stored values. Nothing is written.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from loratools.algebra.device import Device
from loratools.base.codecs import CodedWeight
from loratools.base.dequantised import DequantisedCheckpoint, dequantised
from loratools.operations.fuse.blocks import fused_blocks, single_precision
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.pipeline import by_folder
from loratools.operations.fuse.plan import ADDABLE, TensorPlan, plan_fuse
from loratools.operations.fuse.terms import View, load_terms
from loratools.work.declared import option
from loratools.work.parallel import done_in_order, usable_cores
from loratools.work.requests import Progress
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint
from loratools_formats.checkpoints.pipelines import weighted_folders
from loratools_formats.core.dtypes import FLOATING, SPACINGS, Array, DType, round_into
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

Verdict = Literal["exact", "within rounding", "not contained", "not checked"]

_PRODUCT_ROUNDING = 2.0**-20
# PEFT merges a DoRA in the type of its factors: it rounds the sum, its norm, the magnitude over the
# norm, and the product, half a unit each, twice as much as what `_tolerance` says.
_DORA_ROUNDINGS = 2
_COMPARED = 1 << 20

_DROP = "leave them out with `drop`: "


@dataclass(frozen=True)
class Claim:
    """What a checkpoint is said to be made from, beside its base.

    Attributes:
        adapter: the adapter that should be contained.
    """

    adapter: tuple[str, ...] = option((), heading="Input", metavar="ADAPTER[:WEIGHT]")


@dataclass(frozen=True)
class TensorVerdict:
    """What was found for one tensor.

    Attributes:
        name: the tensor.
        verdict: `exact`: what `fuse` would write; `within rounding`: every element is, up to the
            rounding of its type and of a change that was rounded first; `not contained`; or
            `not checked`.
        touched: whether the adapters change it.
        found: share of ΔW in the tensor, ⟨W' − W, ΔW⟩/‖ΔW‖²; None where nothing changes.
        error: ‖W' − (W + ΔW)‖/‖ΔW‖; None where nothing changes.
        change: ‖ΔW‖; None where it was not computed.
        reason: why it is not contained or was not checked.
    """

    name: str
    verdict: Verdict
    touched: bool
    found: float | None = None
    error: float | None = None
    change: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class VerifyResult:
    """What was found.

    Attributes:
        tensors: every tensor of either checkpoint.
    """

    tensors: tuple[TensorVerdict, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Number of tensors by verdict."""
        return dict(Counter(tensor.verdict for tensor in self.tensors))

    @property
    def contained(self) -> bool | None:
        """Whether the adapters are contained; None if the checkpoint cannot tell."""
        if "not contained" in self.counts:
            return False
        # A scale or a weight of zero touches tensors and changes none.
        nothing = not any(tensor.touched and tensor.change != 0.0 for tensor in self.tensors)
        return None if nothing or "not checked" in self.counts else True

    @property
    def told(self) -> float:
        """Share of ‖ΔW‖², over all tensors, whose presence or absence shows; 0 of no change."""
        changes = [(t.change or 0.0, t.verdict) for t in self.tensors]
        total = sum(change**2 for change, _ in changes)
        known = sum(change**2 for change, verdict in changes if verdict != "not checked")
        return known / total if total else 0.0


def verify(
    fused: Checkpoint,
    base: Checkpoint,
    inputs: Sequence[FuseInput],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Return, for each tensor, whether a checkpoint is the base with the adapters fused in.

    Args:
        fused: the checkpoint in question.
        base: what it is said to be made from.
        inputs: the adapters with their weights.
        workers: threads, the usable cores by default.
        progress: called with (tensors done, tensors in all).

    Raises:
        AdapterError: malformed input, or an adapter that does not fit the base.
        UnsupportedError: a quantisation or an adapter that cannot be read.
    """
    old, new = dequantised(base), dequantised(fused)
    try:
        plans = plan_fuse(old.checkpoint, inputs, None, old.stored).tensors
    except AdapterError as error:
        error.hint = _without_drop(error)
        raise

    def judged(plan: TensorPlan) -> TensorVerdict:
        return _judged(plan, old, new)

    verdicts = done_in_order(judged, plans.values(), workers or usable_cores(), progress)
    verdicts += [
        TensorVerdict(key, "not checked", touched=False, reason="not in the base")
        for key in new.checkpoint.tensors
        if key not in plans
    ]
    for item in inputs:
        item.adapter.check_unchanged()
    return VerifyResult(tuple(verdicts))


def verify_pipeline(
    fused: Path,
    base: Path,
    inputs: Sequence[FuseInput],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Return, for each tensor of a diffusion pipeline, whether adapters are fused in.

    Every component with weights as safetensors is compared, those too that no adapter changes.

    Args:
        fused: the folder of the pipeline in question.
        base: the folder of the pipeline that it is said to be made from.
        inputs: the adapters with their weights.
        workers: threads, the usable cores by default.
        progress: called with (tensors done, tensors in all), anew for each component.

    Raises:
        AdapterError: malformed input, or an adapter of a component that the base has not.
        UnsupportedError: a quantisation or an adapter that cannot be read.
    """
    parts = by_folder(base, inputs)
    found: list[TensorVerdict] = []
    for folder in sorted({*parts, *weighted_folders(base), *weighted_folders(fused)}):
        there = [(path / folder).is_dir() for path in (base, fused)]
        if not all(there):
            missing = "base" if there[1] else "fused pipeline"
            found.append(
                TensorVerdict(
                    f"{folder}/", "not checked", folder in parts, reason=f"not in the {missing}"
                )
            )
            continue
        result = verify(
            read_checkpoint(fused / folder),
            read_checkpoint(base / folder),
            parts.get(folder, []),
            workers=workers,
            progress=progress,
        )
        found += (replace(each, name=f"{folder}/{each.name}") for each in result.tensors)
    return VerifyResult(tuple(found))


def _without_drop(error: AdapterError) -> str | None:
    """Return a hint that does not name `drop`, which fusing has and this has not."""
    _, is_there, pattern = (error.hint or "").partition(_DROP)
    if not is_there or error.path is None:
        return error.hint
    source = shlex.quote(str(error.path))
    return (
        "To check the others alone, leave these out of a copy: "
        f"loratools convert --drop {pattern} {source} -o part.safetensors"
    )


def _judged(
    plan: TensorPlan, old: DequantisedCheckpoint, new: DequantisedCheckpoint
) -> TensorVerdict:
    there = new.checkpoint.tensors.get(plan.key)
    if there is None:
        reason = "no tensor of that name"
        return TensorVerdict(plan.key, "not checked", plan.is_touched, reason=reason)
    if there.shape != plan.source.shape:
        reason = f"shape {list(there.shape)}, expected {list(plan.source.shape)}"
        return TensorVerdict(plan.key, "not contained", plan.is_touched, reason=reason)
    coded = old.weights.get(plan.key), new.weights.get(plan.key)
    if not plan.is_touched and _same_codes(*coded):
        return TensorVerdict(plan.key, "exact", touched=False)
    exactly = plan.key not in new.stored
    if exactly and plan.is_copy and _same_bytes(plan.source, there):
        return TensorVerdict(plan.key, "exact", plan.is_touched)
    if plan.source.dtype.code not in ADDABLE or there.dtype.code not in FLOATING:
        reason = "differs from the base" if not plan.is_touched else "differs from the adapter's"
        return TensorVerdict(plan.key, "not contained", plan.is_touched, reason=reason)
    comparison = _compared(plan, there, exactly=exactly)
    return _verdict(plan, comparison, new.weights.get(plan.key))


def _same_bytes(one: TensorRef, other: TensorRef) -> bool:
    return one.dtype == other.dtype and all(
        bytes(one.raw_range(start, min(start + _COMPARED, one.nbytes)))
        == bytes(other.raw_range(start, min(start + _COMPARED, one.nbytes)))
        for start in range(0, one.nbytes, _COMPARED)
    )


def _same_codes(one: CodedWeight | None, other: CodedWeight | None) -> bool:
    """Return whether two weights are quantised alike, and all their tensors equal."""
    if one is None or other is None or one.scheme != other.scheme or one.dtype != other.dtype:
        return False
    return [part.key for part in one.parts] == [part.key for part in other.parts] and all(
        _same_bytes(*pair) for pair in zip(one.parts, other.parts, strict=True)
    )


@dataclass(frozen=True)
class _Comparison:
    """Sums over all elements of a tensor; W old, W + ΔW wanted, W' found.

    Attributes:
        is_exact: W' is the wanted values, rounded.
        base_is_exact: so is W: rounding erases the change.
        is_near: every element of W' is within the tolerance.
        base_is_near: so is every element of W, so that the change cannot be seen.
        delta: ‖ΔW‖².
        along: ⟨W' − W, ΔW⟩.
        off: ‖W' − (W + ΔW)‖².
    """

    is_exact: bool
    base_is_exact: bool
    is_near: bool
    base_is_near: bool
    delta: float
    along: float
    off: float


def _compared(plan: TensorPlan, there: TensorRef, *, exactly: bool) -> _Comparison:
    view = View.of(plan.source.shape, plan.changes)
    terms = load_terms(plan.changes, view)
    # As `fuse` computes, so that what it wrote is found to be exact.
    single = single_precision(view, terms, there.dtype.code, base_code=plan.source.dtype.code)
    wanted_type = there.dtype.numpy_dtype()
    roundings = _DORA_ROUNDINGS if any(not t.is_product for plane in terms for t in plane) else 1
    is_exact = base_is_exact = is_near = base_is_near = True
    delta = along = off = 0.0
    blocks = fused_blocks(
        plan.source, view, terms, plan.patches, single=single, device=Device("cpu")
    )
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks:
            total = block.total.reshape(-1)
            stored = there.elements(block.start, block.start + len(total))
            rounded = np.empty(total.shape, wanted_type)
            round_into(total, rounded)
            is_same = exactly and bool((rounded == stored).all())
            is_exact = is_exact and is_same
            wanted, found = total.astype(np.float64), stored.astype(np.float64)
            old = plan.old_values(block.start, block.base.reshape(-1)).astype(np.float64)
            change = wanted - old
            if base_is_exact:
                base_is_exact = bool((rounded.astype(np.float64) == old).all())
            if base_is_near or (is_near and not is_same):
                tolerance = roundings * _tolerance(there.dtype, wanted, change)
                is_near = is_near and bool((np.abs(found - wanted) <= tolerance).all())
                base_is_near = base_is_near and bool((np.abs(change) <= tolerance).all())
            delta += float(np.dot(change, change))
            along += float(np.dot(found - old, change))
            off += float(np.dot(found - wanted, found - wanted))
    return _Comparison(is_exact, base_is_exact, is_near, base_is_near, delta, along, off)


def _tolerance(dtype: DType, wanted: Array, change: Array) -> Array:
    """Return how far an element may be off: a unit in the last place of the sum and of the change.

    The second is for tools that round the change before they add it. Errors of products in float32
    are allowed for too.
    """
    spacing = SPACINGS[dtype.code]
    largest = float(np.abs(change).max(initial=0.0))
    tolerance: Array = np.abs(wanted) + np.abs(change)
    tolerance *= spacing.relative
    tolerance += _PRODUCT_ROUNDING * largest + spacing.smallest
    return tolerance


def _verdict(plan: TensorPlan, c: _Comparison, coded: CodedWeight | None) -> TensorVerdict:
    is_measured = c.delta > 0 and math.isfinite(c.off)
    found = c.along / c.delta if is_measured else None
    error = math.sqrt(c.off / c.delta) if is_measured else None
    is_still = plan.is_touched and c.delta == 0.0
    change = math.sqrt(c.delta) if is_measured or is_still else None

    def result(verdict: Verdict, reason: str | None = None) -> TensorVerdict:
        return TensorVerdict(plan.key, verdict, plan.is_touched, found, error, change, reason)

    if not math.isfinite(c.delta):
        return TensorVerdict(
            plan.key,
            "not checked",
            plan.is_touched,
            reason="the base tensor holds NaN or infinite values",
        )
    if c.is_exact and c.base_is_exact and c.delta:
        return result("not checked", "the change is below the rounding of its type")
    if c.is_exact:
        return result("exact")
    if not math.isfinite(c.off):
        return result("not contained", "holds NaN or infinite values")
    if coded is not None and plan.is_touched:
        bits = "four" if coded.scheme.bits == 4 else coded.scheme.bits
        return result("not checked", f"stored in {bits} bits, whose steps are larger than rounding")
    if c.is_near and c.base_is_near and c.delta:
        return result("not checked", "the change is below the rounding of its type")
    if c.is_near:
        return result("within rounding")
    if not plan.is_touched:
        return result("not contained", "differs from the base, though no adapter changes it")
    return result("not contained")
