"""A DoRA whose weight is edited: W' − Σ wⱼ uⱼ vⱼᵀ as magnitudes and a direction again.

With gains g = m/‖W + ΔW‖, W' = g ⊙ (W + ΔW). The edited weight is g ⊙ (W + ΔW + g⁻¹ ⊙ E): the
direction takes the edits over g, which raises its rank by their number, and the magnitudes become
the norms of the edited weight. Nothing of that is an approximation; lowering the rank again is, in
the norm of the weight itself. Source of the decomposition: arXiv 2402.09353.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Decomposed, Matrix, RandomisedSvd
from loratools.lowrank.matrices import loaded
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import Resizer, rounded
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import Array


@dataclass(frozen=True)
class DoraWeight:
    """The weight that a DoRA makes of W, magnitudes per output.

    Attributes:
        weight: W (out, in) float64.
        direction: ΔW (out, in) float64.
        magnitudes: m (out,) float64.
    """

    weight: Array
    direction: Array
    magnitudes: Array

    @property
    def gains(self) -> Array:
        """(out, 1): m/‖W + ΔW‖, and m of outputs that are zero."""
        norms = np.linalg.norm(self.weight + self.direction, axis=1)
        gains: Array = (self.magnitudes / np.where(norms > 0.0, norms, 1.0))[:, None]
        return gains

    @property
    def merged(self) -> Array:
        """W' (out, in)."""
        merged: Array = self.gains * (self.weight + self.direction)
        return merged


class Weighted:
    """A matrix whose error counts after its outputs are multiplied by gains.

    Args:
        inner: gains ⊙ X, taken apart.
        gains: (out, 1); outputs of gain 0 are zero in X.
    """

    def __init__(self, inner: Decomposed, gains: Array) -> None:
        self._inner, self._gains = inner, gains
        self._back = np.divide(1.0, gains, out=np.zeros_like(gains), where=gains != 0.0)

    @property
    def squared_norm(self) -> float:
        """‖gains ⊙ X‖²_F."""
        return self._inner.squared_norm

    @property
    def singular_values(self) -> Array:
        """Those of gains ⊙ X."""
        return self._inner.singular_values

    def factors(self, rank: int, randomised: RandomisedSvd | None = None) -> tuple[Array, Array]:
        """Return (b, a) of X with the least error of gains ⊙ (X − b @ a)."""
        b, a = self._inner.factors(rank, randomised)
        return self._back * b, a

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖gains ⊙ (X − b @ a)‖²_F."""
        return self._inner.squared_error(self._gains * b, a)


@dataclass(frozen=True)
class EditedDora:
    """A DoRA after an edit, as it is stored.

    Attributes:
        change: direction and magnitudes.
        squared_intended: ‖W'' − W‖²_F of the weight W'' that was meant.
        squared_error: ‖·‖²_F of the difference between it and what is stored.
    """

    change: ModuleChange
    squared_intended: float
    squared_error: float


def edited_dora(
    name: str,
    whole: ModuleChange,
    dora: DoraWeight,
    edits: tuple[Array, Array],
    rank: int,
    resizer: Resizer,
) -> EditedDora:
    """Return a DoRA whose weight W' has become W' + l @ r, at a rank.

    Args:
        name: the module.
        whole: the module's change, with magnitudes per output.
        dora: its weight.
        edits: l (out, k) and r (k, in); outputs whose weight is zero are zero in l.
        rank: of the direction.
        resizer: stores factors and magnitudes.
    """
    left, right = edits
    delta, magnitude = whole.require_factors(), whole.magnitude
    assert magnitude is not None
    ((b, a),) = loaded(delta)
    gains = dora.gains
    product = Matrix(
        np.concatenate([delta.scale * gains * b.astype(np.float64, copy=False), left], axis=1),
        np.concatenate([a.astype(np.float64, copy=False), right]),
        1.0,
        Device(resizer.options.device),
        use_gram=False,
    )
    like = PlannedFactors.like(delta)
    if like.alpha is None:
        like = replace(like, alpha=delta.scale * delta.rank)
    done = resizer.compressed(name, like, [Weighted(product, gains)], rank)
    direction = replace(done.delta, alpha=None) if delta.alpha is None else done.delta
    ((new_b, new_a),) = loaded(direction)
    whole_direction = dora.weight + direction.scale * (new_b.astype(np.float64) @ new_a)
    norms = np.linalg.norm(whole_direction, axis=1)
    # Of the gains that the DoRA had, so that its outputs are off by the direction's error only.
    dtype = resizer.options.stored(magnitude)
    stored, back = rounded(gains[:, 0] * norms, dtype, magnitude.key)
    made = whole_direction * (back / np.where(norms > 0.0, norms, 1.0))[:, None]
    intended = dora.merged + left @ right
    kept = resizer.scratch.store(magnitude.key, stored.reshape(magnitude.shape), dtype)
    return EditedDora(
        ModuleChange(direction, kept, whole.axis),
        float(np.sum((intended - dora.weight) ** 2)),
        float(np.sum((intended - made) ** 2)),
    )
