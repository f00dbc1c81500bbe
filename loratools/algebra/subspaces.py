"""How the spaces of two changes lie to each other, and how their signs agree.

Overlap: ‖U₁ᵀU₂‖²_F/min(i, j) of orthonormal bases of i and j dimensions (arXiv 2106.09685, §7.2),
in [0, 1]; for spaces drawn uniformly at random in n dimensions its mean is max(i, j)/n. Angles:
Björck, Golub 1973, with sines where cosines lose precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.thin import Thin
from loratools_formats.core.dtypes import Array

_Z = 1.959963984540054  # of an interval of 95 %
_DENSITY = 0.2
"""Share of entries that TIES keeps, as in arXiv 2306.01708."""


def overlap(one: Array, other: Array) -> float:
    """Return ‖Q₁ᵀQ₂‖²_F/min(i, j) of orthonormal columns (n, i) and (n, j)."""
    count = min(one.shape[1], other.shape[1])
    total = float(np.sum((one.T @ other) ** 2))
    return total / count if count else 0.0


def random_overlap(one: Array, other: Array) -> float:
    """Return the mean of `overlap` for random spaces of these dimensions: max(i, j)/n."""
    return float(max(one.shape[1], other.shape[1]) / len(one))


def principal_angles(one: Array, other: Array) -> Array:
    """Return the angles between two spaces in radians, ascending: (min(i, j),)."""
    product = one.T @ other
    cosines = np.clip(np.linalg.svd(product, compute_uv=False), -1.0, 1.0)
    narrow, wide = (one, other) if one.shape[1] < other.shape[1] else (other, one)
    sines = np.linalg.svd(narrow - wide @ (wide.T @ narrow), compute_uv=False)
    sines = np.clip(sines[::-1], -1.0, 1.0)
    angles: Array = np.where(cosines**2 < 0.5, np.arccos(cosines), np.arcsin(sines))
    return np.sort(angles)


@dataclass(frozen=True)
class EntryMeasures:
    """What the entries of several changes of one weight tell.

    Attributes:
        conflict: share of entries of opposite sign, among those that are zero in neither; of the
            first two changes.
        low: lower end of its 95 % interval (Wilson); equal to it where every entry was seen.
        high: upper end.
        exact: whether every entry was seen.
        ties_errors: Σ(M − Δᵢ)² over the entries seen, M the merge by TIES.
        ties_energies: ΣΔᵢ² over the entries seen.
    """

    conflict: float
    low: float
    high: float
    exact: bool
    ties_errors: tuple[float, ...]
    ties_energies: tuple[float, ...]


def entry_measures(
    changes: Sequence[Sequence[Thin]], sample: int | None, seed: int
) -> EntryMeasures:
    """Compare entries of changes, all or a sample drawn uniformly with replacement.

    Args:
        changes: for each adapter, its matrices: one, or one for each expert.
        sample: entries to draw over all matrices; None for all.
        seed: of the sample.
    """
    matrices = list(zip(*changes, strict=True))
    rows, columns = matrices[0][0].shape
    total = rows * columns * len(matrices)
    exact = sample is None or sample >= total
    if exact:
        values = [_all_entries([row[i] for row in matrices]) for i in range(len(changes))]
    else:
        places = np.random.default_rng(seed).integers(0, total, size=sample)
        values = [_entries([row[i] for row in matrices], places) for i in range(len(changes))]
    product = values[0] * values[1]
    seen = int(np.count_nonzero(product))
    against = int(np.count_nonzero(product < 0.0))
    share = against / seen if seen else 0.0
    low, high = (share, share) if exact or not seen else _wilson(against, seen)
    merged = ties(values)
    return EntryMeasures(
        share,
        low,
        high,
        exact,
        tuple(float(np.sum((merged - value) ** 2)) for value in values),
        tuple(float(np.sum(value**2)) for value in values),
    )


def _all_entries(stack: Sequence[Thin]) -> Array:
    return np.concatenate([block.reshape(-1) for thin in stack for _, _, block in thin.blocks()])


def _entries(stack: Sequence[Thin], places: Array) -> Array:
    rows, columns = stack[0].shape
    which, inside = np.divmod(places, rows * columns)
    values = np.empty(len(places))
    for index, thin in enumerate(stack):
        here = np.flatnonzero(which == index)
        values[here] = thin.entries(*np.divmod(inside[here], columns))
    return values


def _wilson(count: int, total: int) -> tuple[float, float]:
    share, z = count / total, _Z
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def ties(values: Sequence[Array], density: float = _DENSITY) -> Array:
    """Merge entries by TIES (arXiv 2306.01708): trim, elect signs by mass, mean of the agreeing.

    Args:
        values: (S,) of each change.
        density: share of entries of each that is kept, the largest.
    """
    kept = max(1, int(density * len(values[0])))
    trimmed = np.stack([_trimmed(value, kept) for value in values])
    sign = np.where(trimmed.sum(axis=0) >= 0.0, 1.0, -1.0)
    agreeing = np.where(trimmed * sign > 0.0, trimmed, 0.0)
    count = np.count_nonzero(agreeing, axis=0)
    merged: Array = agreeing.sum(axis=0) / np.maximum(count, 1)
    return merged


def _trimmed(value: Array, kept: int) -> Array:
    sizes = np.abs(value)
    least = np.partition(sizes, len(sizes) - kept)[len(sizes) - kept]
    return np.where(sizes >= least, value, 0.0)
