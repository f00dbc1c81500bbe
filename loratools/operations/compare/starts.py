"""Whether the A factors of adapters come from one start.

Training moves A little from where it began, so that adapters of one initialisation, or of one run,
have nearly equal A, row by row. Squeezing mixes the rows and drops some; the space that they span
still lies in the space of the adapter that it was made from.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratools_formats.core.dtypes import Array

_WIDE = 0.5
"""Spaces that share more than this at random tell nothing."""
_FLOOR = 1e-10
"""Eigenvalues of a Gram matrix below this share of the largest are rounding."""


@dataclass(frozen=True)
class Starts:
    """The A factors of one module of N adapters; NaN where one has no factors.

    Attributes:
        inner: (N, N) ⟨Aᵢ, Aⱼ⟩ over the leading rows that both have.
        ours: (N, N) ‖Aᵢ‖² over those rows.
        theirs: (N, N) ‖Aⱼ‖² over them.
        overlaps: (N, N) share of the smaller row space that lies within the larger, less what
            random spaces share; NaN where that is more than half of it.
    """

    inner: Array
    ours: Array
    theirs: Array
    overlaps: Array


def unknown(count: int) -> Starts:
    """Return what is known of `count` adapters without factors: nothing."""
    inner, ours, theirs, overlaps = np.full((4, count, count), np.nan)
    return Starts(inner, ours, theirs, overlaps)


def starts(grams: Sequence[Array], ranks: Sequence[int], width: int) -> Starts:
    """Compare A factors from their Gram matrices.

    Args:
        grams: for each expert, the (R, R) inner products of all rows of all A, R = Σ rᵢ.
        ranks: rᵢ of each adapter.
        width: columns of A.
    """
    ends = np.cumsum([0, *ranks])
    blocks = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
    count = len(blocks)
    inner, ours, theirs, overlaps = np.zeros((4, count, count))
    for gram in grams:
        diagonal = np.diag(gram)
        for row in range(max(ranks)):
            have = np.flatnonzero(np.array(ranks) > row)
            rows, here = ends[have] + row, np.ix_(have, have)
            inner[here] += gram[np.ix_(rows, rows)]
            ours[here] += diagonal[rows][:, None]
            theirs[here] += diagonal[rows]
        overlaps += _overlaps(gram, blocks, width) / len(grams)
    return Starts(inner, ours, theirs, overlaps)


def _overlaps(gram: Array, blocks: Sequence[slice], width: int) -> Array:
    """Return the (N, N) overlaps of row spaces, less those of random spaces."""
    bases = [_basis(gram[block, block]) for block in blocks]
    rows = [basis.T @ gram[block] for basis, block in zip(bases, blocks, strict=True)]
    tall = np.concatenate(rows)
    columns = [tall[:, block] @ basis for basis, block in zip(bases, blocks, strict=True)]
    sizes = np.array([basis.shape[1] for basis in bases])
    first = np.cumsum([0, *sizes[:-1]])
    shared = np.zeros((len(blocks), len(blocks)))
    for j, part in enumerate(columns):
        if part.size:
            padded = np.concatenate([np.sum(part**2, axis=1), [0.0]])
            sums = np.add.reduceat(padded, first)
            shared[:, j] = np.where(sizes > 0, sums, 0.0)
    smaller = np.minimum.outer(sizes, sizes)
    random = np.maximum.outer(sizes, sizes) / width
    shared = np.divide(shared, smaller, out=np.full_like(shared, np.nan), where=smaller > 0)
    found: Array = np.where(random <= _WIDE, (shared - random) / (1.0 - random), np.nan)
    return found


def _basis(gram: Array) -> Array:
    """Return T: (r, k) so that TᵀA has orthonormal rows, of A with A Aᵀ = gram."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > _FLOOR * max(float(values[-1]), np.finfo(np.float64).tiny)
    basis: Array = vectors[:, kept] / np.sqrt(values[kept])
    return basis
