"""One tensor fused: its blocks computed, rounded, measured and handed on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loratools.algebra import linalg
from loratools.algebra.device import Device
from loratools.operations.fuse.blocks import BUFFERS, fused_blocks, single_precision
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.terms import RowsTerm, Term, View, load_terms, stacked
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
    view = View.of(plan.source.shape, stacked=stacked(plan.changes))
    terms = load_terms(plan.changes, view)
    dtype = plan.dtype.numpy_dtype()
    single = single_precision(view, terms, plan.dtype.code, base_code=plan.source.dtype.code)
    known = None if plan.replaces else squared_of_products(terms)
    base, delta, rounding, gained = 0.0, known or 0.0, 0.0, 0.0
    blocks = fused_blocks(plan.source, view, terms, plan.patches, single=single, device=device)
    for block in blocks:
        w, total = block.base.reshape(-1), block.total.reshape(-1)
        stored = BUFFERS.array("rounded", total.shape, dtype)
        round_into(total, stored)
        store(block.start, stored)
        old = plan.old_values(block.start, w)
        base += squared_norm(old)
        change = np.subtract(total, old, out=BUFFERS.array("change", total.shape, total.dtype))
        if known is None:
            delta += squared_norm(change)
        round_into(stored, w)
        error = squared_norm(np.subtract(w, total, out=w))
        rounding += error
        if error > _SHOWS * squared_norm(change):
            gained += inner_product(w, change)
    if not math.isfinite(rounding + base + delta):
        raise not_finite(plan, plan.dtype.code)
    return TensorReport(
        plan.key,
        plan.modules,
        plan.dtype.code,
        math.sqrt(base),
        math.sqrt(delta),
        math.sqrt(rounding),
        rounded=None if plan.replaces else 1.0 + gained / delta if delta else 1.0,
    )


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


def squared_of_products(terms: list[list[Term | RowsTerm]]) -> float | None:
    """Return ‖ΔW‖² from the factors; None if the terms are no products, or lie over each other."""
    found = [term for plane in terms for term in plane]
    products = [term for term in found if isinstance(term, Term) and term.is_product]
    if len(products) < len(found) or any(len(plane) > 1 for plane in terms):
        return None
    return sum(
        term.weight**2 * linalg.grams(term.left, term.right).squared_norm for term in products
    )


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
