"""One tensor fused: its blocks computed, rounded, measured and handed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loratools.algebra import linalg
from loratools.algebra.device import Device
from loratools.operations.fuse.blocks import BUFFERS, Block, fused_blocks, single_precision
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.terms import RowsTerm, Term, View, load_terms
from loratools_formats.core.dtypes import Array, round_into
from loratools_formats.disk.errors import AdapterError, LoratoolsError

_CHECKED_ELEMENTS = 1 << 20
_LEAST_SQUARES = 1e-25
_SHOWS = 1e-2  # of ‖ΔW‖², below which a block's rounding takes no more than a tenth of its change


@dataclass(frozen=True)
class TensorReport:
    """What fusing did to one tensor.

    Attributes:
        key: its name.
        modules: the adapters' modules that change it; empty for a replacement.
        dtype: type it is stored in.
        base_norm: ‖W‖.
        delta_norm: ‖ΔW‖, that of the difference for a replacement.
        rounding_norm: ‖W' − (W + ΔW)‖, where W' is stored.
        surviving: share of ΔW found in the stored tensor, ⟨W' − W, ΔW⟩/‖ΔW‖², where the result is
            quantised again; None otherwise.
        rounded: that share where the result is rounded to a floating type; None for others, and for
            replacements.
        base_rounding: ‖W − dq(q(W))‖ where ΔW is added to a base that was rounded to four bits
            first; None otherwise.
    """

    key: str
    modules: tuple[str, ...]
    dtype: str
    base_norm: float
    delta_norm: float
    rounding_norm: float
    surviving: float | None = None
    rounded: float | None = None
    base_rounding: float | None = None

    @property
    def relative_change(self) -> float | None:
        """‖ΔW‖/‖W‖, None if W is zero."""
        return self.delta_norm / self.base_norm if self.base_norm else None

    @property
    def lost(self) -> float:
        """Share of ΔW lost to rounding, ‖W' − (W + ΔW)‖/‖ΔW‖; 0 if nothing changes."""
        return self.rounding_norm / self.delta_norm if self.delta_norm else 0.0


@np.errstate(over="ignore", invalid="ignore")
def fuse_tensor(
    plan: TensorPlan, device: Device, store: Callable[[int, Array], None]
) -> TensorReport:
    """Compute a tensor block by block and hand the rounded blocks to `store`.

    Args:
        plan: the tensor.
        device: where products are computed.
        store: called with the first element's index and the block in the type to store, in order.

    Raises:
        AdapterError: NaN or infinite values in the base, or in the result.
    """
    view = View.of(plan.source.shape, plan.changes)
    terms = load_terms(plan.changes, view)
    dtype = plan.dtype.numpy_dtype()
    single = single_precision(view, terms, plan.dtype.code, base_code=plan.source.dtype.code)
    squares = None if plan.replaces or not are_products(terms) else SquaresOfProducts(terms, view)
    base, delta, rounding, gained = 0.0, 0.0, 0.0, 0.0
    blocks = fused_blocks(plan.source, view, terms, plan.patches, single=single, device=device)
    for block in blocks:
        w, total = block.base.reshape(-1), block.total.reshape(-1)
        stored = BUFFERS.array("rounded", total.shape, dtype)
        round_into(total, stored)
        store(block.start, stored)
        old = plan.old_values(block.start, w)
        base += squared_norm(old)
        lost = BUFFERS.array("lost", total.shape, total.dtype)
        round_into(stored, lost)
        error = squared_norm(np.subtract(lost, total, out=lost))
        rounding += error
        squared = None if squares is None else squares.of(block)
        if squared is None or error > _SHOWS * squared:
            change = np.subtract(total, old, out=w)
            if squared is None:
                squared = squared_norm(change)
            if error > _SHOWS * squared:
                gained += inner_product(lost, change)
        delta += squared
    rounded = None if plan.replaces else 1.0 + gained / delta if delta else 1.0
    report = measured(plan, plan.dtype.code, (base, delta, rounding))
    return replace(report, rounded=rounded)


def measured(
    plan: TensorPlan, dtype: str, squares: tuple[float, float, float], scheme: str | None = None
) -> TensorReport:
    """Return the report of a tensor.

    Args:
        plan: the tensor.
        dtype: what reports call the type that it is stored in.
        squares: ‖W‖², ‖ΔW‖² and ‖W' − (W + ΔW)‖² of its elements.
        scheme: what errors call the type, if not the same.

    Raises:
        AdapterError: values are not finite.
    """
    if not math.isfinite(sum(squares)):
        raise not_finite(plan, scheme or dtype)
    return TensorReport(plan.key, plan.modules, dtype, *map(math.sqrt, squares))


def inner_product(x: Array, y: Array) -> float:
    """Return ⟨x, y⟩ of flat arrays, summed in float64."""
    return float(np.dot(x.astype(np.float64), y.astype(np.float64)))


def squared_norm(values: Array) -> float:
    """Return ‖values‖² of a flat array, to some four digits if it is of float32."""
    found = float(np.dot(values, values))
    if _LEAST_SQUARES < found < math.inf:
        return found
    wide = values.astype(np.float64)  # squares of values beyond 10^±19 leave the range of float32
    return float(np.dot(wide, wide))


def are_products(terms: Sequence[Sequence[Term | RowsTerm]]) -> bool:
    """Return whether all terms are products, and none lies over another."""
    return all(
        len(plane) <= 1 and all(isinstance(t, Term) and t.is_product for t in plane)
        for plane in terms
    )


class SquaresOfProducts:
    """‖ΔW‖² of blocks of a tensor, from the factors of products of which none lies over another."""

    def __init__(self, terms: Sequence[Sequence[Term | RowsTerm]], view: View) -> None:
        self._terms = [next((t for t in plane if isinstance(t, Term)), None) for plane in terms]
        self._view = view
        self._plane, self._right = -1, np.zeros((0, 0))

    def of(self, block: Block) -> float:
        """Return ‖ΔW‖² of a block, best asked for plane by plane."""
        plane, top = divmod(block.start // self._view.columns, self._view.rows)
        term = self._terms[plane]
        if term is None:
            return 0.0
        if plane != self._plane:
            self._plane, self._right = plane, linalg.gram(term.right.T)
        first, last = term.rows
        start, stop = max(first, top), min(last, top + len(block.base))
        if start >= stop:
            return 0.0
        grams = linalg.Grams(linalg.gram(term.left[start - first : stop - first]), self._right)
        return term.weight**2 * grams.squared_norm


def not_finite(plan: TensorPlan, code: str) -> LoratoolsError:
    """Return the error that values are not finite, those of an input or those to store as `code`.

    Args:
        plan: the tensor.
        code: name of the type to store.
    """
    whose = "base tensor" if plan.replaced_by is None else f"tensor of {plan.replaced_by}"
    for tensor in (plan.source, *(patch.values for patch in plan.patches)):
        for start in range(0, tensor.numel, _CHECKED_ELEMENTS):
            stop = min(start + _CHECKED_ELEMENTS, tensor.numel)
            if not np.isfinite(tensor.elements(start, stop).astype(np.float64)).all():
                return AdapterError(f"{whose} holds NaN or infinite values", tensor=tensor.key)
    return AdapterError(
        f"the result does not fit {code}: values overflow",
        tensor=plan.key,
        hint="Choose a wider type with `dtype`",
    )
