"""Whether the A factors of adapters come from one start.

Training moves A little from where it began, so that adapters of one initialisation, or of one run,
have nearly equal A, row by row. Squeezing mixes the rows and drops some; the space that they span
still lies in the space of the adapter that it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratools_formats.core.dtypes import Array

_WIDE = 0.5
"""If random spaces would share more than this, what two spaces share tells nothing."""
FLOOR, FLOOR_IN_SINGLE = 1e-10, 1e-5
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


def starts(
    grams: Sequence[Array], ranks: Sequence[int], width: int, floor: float = FLOOR
) -> Starts:
    """Compare A factors from their Gram matrices.

    Args:
        grams: for each expert, the (R, R) inner products of all rows of all A, R = Σ rᵢ.
        ranks: rᵢ of each adapter.
        width: columns of A.
        floor: share of the largest eigenvalue of a Gram matrix below which one is rounding.
    """
    ends = np.cumsum([0, *ranks])
    count = len(ranks)
    inner, ours, theirs, overlaps = np.zeros((4, count, count))
    for gram in grams:
        diagonal = np.diag(gram)
        for row in range(max(ranks)):
            have = np.flatnonzero(np.array(ranks) > row)
            rows, here = ends[have] + row, np.ix_(have, have)
            inner[here] += gram[np.ix_(rows, rows)]
            ours[here] += diagonal[rows][:, None]
            theirs[here] += diagonal[rows]
        overlaps += _overlaps(gram, ranks, width, floor) / len(grams)
    return Starts(inner, ours, theirs, overlaps)


def _overlaps(gram: Array, ranks: Sequence[int], width: int, floor: float) -> Array:
    """Return the (N, N) overlaps of row spaces, less those of random spaces."""
    starts = np.cumsum([0, *ranks[:-1]])
    count = len(ranks)
    sizes, shared = np.zeros(count), np.zeros((count, count))
    groups = []  # all adapters of one rank are computed at once
    for rank in sorted(set(ranks)):
        members = np.flatnonzero(np.array(ranks) == rank)
        rows = starts[members][:, None] + np.arange(rank)
        bases, sizes[members] = _bases(gram[rows[:, :, None], rows[:, None, :]], floor)
        groups.append((members, rows, bases))
    for ours, our_rows, our_bases in groups:
        for theirs, their_rows, their_bases in groups:
            part = gram[np.ix_(our_rows.reshape(-1), their_rows.reshape(-1))]
            half = our_bases.transpose(0, 2, 1) @ part.reshape(*our_rows.shape, -1)
            half = half.reshape(our_rows.size, *their_rows.shape).transpose(1, 0, 2)
            whole = np.sum((half @ their_bases) ** 2, axis=2)  # (theirs, rows of ours)
            sums = whole.reshape(len(theirs), *our_rows.shape).sum(axis=2)
            shared[np.ix_(ours, theirs)] = sums.T
    smaller = np.minimum.outer(sizes, sizes)
    random = np.maximum.outer(sizes, sizes) / width
    shared = np.divide(shared, smaller, out=np.full_like(shared, np.nan), where=smaller > 0)
    is_known = random <= _WIDE  # a space of the whole width is random's, too
    unknown = np.full_like(shared, np.nan)
    found: Array = np.divide(shared - random, 1.0 - random, out=unknown, where=is_known)
    return found


def _bases(grams: Array, floor: float) -> tuple[Array, Array]:
    """Return T (N, r, r) and k (N,): the last k columns of TᵀA are orthonormal, the others zero.

    Args:
        grams: (N, r, r), A Aᵀ of each.
        floor: share of the largest eigenvalue below which one is rounding.
    """
    values, vectors = np.linalg.eigh(grams)
    least = floor * np.maximum(values[:, -1:], np.finfo(np.float64).tiny)
    kept = values > least
    roots = np.sqrt(np.where(kept, values, 1.0))
    bases: Array = np.where(kept, 1.0 / roots, 0.0)[:, None, :] * vectors
    return bases, kept.sum(axis=1)
