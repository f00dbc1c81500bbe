"""Products whose terms nearly cancel: ΔW = scale · b @ a far smaller than its columns and rows.

Gram matrices see ‖ΔW‖ only above √ε of Σ‖bᵢ‖‖aᵢ‖, QR in float64 above ε of it, at a hundredth of
what is said next. Where `cancels` says that the first may not be enough, and `is_enough` that the
second is not, the factors are orthogonalised in double-double arithmetic, pairs of float64 whose
sum has about 100 bits, and only the small core is rounded to float64. What lies below `floor`
cannot be told from zero even so.

Sources: Dekker 1971 (products), Knuth (sums), Giraud et al. 2005 (Gram–Schmidt, twice is enough).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.algebra.linalg import Grams, namespace
from loratools_formats.core.dtypes import Array

_LEAST_SHARE = 1e-3
"""Of Σ‖bᵢ‖²‖aᵢ‖², below which ‖ΔW‖² has cancelled; the Gram route then errs by 5e-7 of ‖ΔW‖."""

_LEAST_SHARE_FOR_QR = 1e-9
"""Of the same; QR in float64 then errs by about 1e-11 of ‖ΔW‖, far below what float32 can store."""

_ERROR = 2.0**-94
"""Of a double-double sum over the rows, relative to its terms; more than any sum here makes."""

_WHOLE = 0.5
"""Of a column's length, above which what is left of it needs no second sweep."""

_SHORT = 1e-10
"""Of a column's length, below which what is left of it is made orthogonal once more."""

_SPLIT = 134217729.0  # 2²⁷ + 1


@dataclass(frozen=True)
class Cancellation:
    """How much of a product's terms cancels.

    Attributes:
        squared_norm: ‖b @ a‖²_F, as far as it shows.
        terms: Σ‖bᵢ‖²‖aᵢ‖².
    """

    squared_norm: float
    terms: float

    @classmethod
    def of(cls, both: Grams) -> Cancellation:
        """Return that of a product by its Gram matrices."""
        xp = namespace(both.b)
        terms = xp.sum(xp.linalg.diagonal(both.b) * xp.linalg.diagonal(both.a))
        return cls(both.squared_norm, float(terms))

    @property
    def cancels(self) -> bool:
        """Whether ‖b @ a‖² is small beside the terms, which Gram matrices may hide."""
        return math.isfinite(self.terms) and self.squared_norm < _LEAST_SHARE * self.terms

    @property
    def is_enough(self) -> bool:
        """Whether QR in float64 tells ‖b @ a‖ as well as factors stored in 32 bits need it."""
        return self.squared_norm >= _LEAST_SHARE_FOR_QR * self.terms


@dataclass(frozen=True)
class Pair:
    """Numbers of about 100 bits, `high + low`, in arrays of equal shape."""

    high: Array
    low: Array

    def __getitem__(self, key: Any) -> Pair:
        return Pair(self.high[key], self.low[key])

    @property
    def transposed(self) -> Pair:
        """The transpose."""
        return Pair(self.high.T, self.low.T)


def _quick_sum(x: Array, y: Array) -> Pair:
    total = x + y
    return Pair(total, y - (total - x))


def _two_sum(x: Array, y: Array) -> Pair:
    total = x + y
    back = total - x
    return Pair(total, (x - (total - back)) + (y - back))


def _halves(x: Array) -> tuple[Array, Array]:
    wide = _SPLIT * x
    high = wide - (wide - x)
    return high, x - high


def _times(x: Pair, y: Pair) -> Pair:
    product = x.high * y.high
    (x1, x2), (y1, y2) = _halves(x.high), _halves(y.high)
    error = ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2
    return _quick_sum(product, error + (x.high * y.low + x.low * y.high))


def _plus(x: Pair, y: Pair) -> Pair:
    high, low = _two_sum(x.high, y.high), _two_sum(x.low, y.low)
    first = _quick_sum(high.high, high.low + low.high)
    return _quick_sum(first.high, first.low + low.low)


def _minus(x: Pair, y: Pair) -> Pair:
    return _plus(x, Pair(-y.high, -y.low))


def _total(x: Pair) -> Pair:
    """Return the sums over the first axis, in a tree."""
    while len(x.high) > 1:
        half = len(x.high) // 2
        rest = x[2 * half :]
        x = _plus(x[:half], x[half : 2 * half])
        if len(rest.high):
            x = Pair(np.concatenate([x.high, rest.high]), np.concatenate([x.low, rest.low]))
    return x[0]


def _root(x: Pair) -> Pair:
    """Return the square root of numbers above 0."""
    first = np.sqrt(x.high)
    square = _times(Pair(first, np.zeros_like(first)), Pair(first, np.zeros_like(first)))
    return _quick_sum(first, _minus(x, square).high / (2.0 * first))


def _over(x: Pair, divisor: Pair) -> Pair:
    """Return x divided by one number."""
    first = x.high / divisor.high
    spread = Pair(
        np.broadcast_to(divisor.high, first.shape), np.broadcast_to(divisor.low, first.shape)
    )
    rest = _minus(x, _times(Pair(first, np.zeros_like(first)), spread))
    return _quick_sum(first, rest.high / divisor.high)


def _orthogonalised(columns: Array) -> tuple[Array, Pair]:
    """Return Q (n, k) rounded to float64 and R (k, r), Q @ R = columns.

    k is the number of columns that do not depend on those before them.
    """
    rows, rank = columns.shape
    most = min(rows, rank)
    q = Pair(np.zeros((rows, most)), np.zeros((rows, most)))
    r = Pair(np.zeros((most, rank)), np.zeros((most, rank)))
    k = 0
    for j in range(rank):
        v = Pair(columns[:, j].copy(), np.zeros(rows))
        size = float(np.linalg.norm(v.high))
        known = q[:, :k]
        for sweep in range(2 if k else 0):
            if sweep and float(np.linalg.norm(v.high)) > _WHOLE * size:
                break
            share = _total(_times(known, Pair(v.high[:, None], v.low[:, None])))
            taken = _total(_times(known, share).transposed)
            v = _minus(v, taken)
            added = _plus(r[:k, j], share)
            r.high[:k, j], r.low[:k, j] = added.high, added.low
        if k == most or float(np.linalg.norm(v.high)) <= rows * _ERROR * size:
            continue
        length = _root(_total(_times(v, v)))
        unit = _over(v, length)
        if k and float(length.high) < _SHORT * size:  # no more orthogonal than it is long
            share = _total(_times(known, Pair(unit.high[:, None], unit.low[:, None])))
            unit = _minus(unit, _total(_times(known, share).transposed))
            unit = _over(unit, _root(_total(_times(unit, unit))))
        q.high[:, k], q.low[:, k] = unit.high, unit.low
        r.high[k, j], r.low[k, j] = length.high, length.low
        k += 1
    return q.high[:, :k], r[:k]


@dataclass(frozen=True)
class Core:
    """A product taken apart without cancellation: b @ diag(weights) @ a = q_b @ core @ q_a.T.

    Attributes:
        q_b: (out, k), orthonormal columns.
        q_a: (in, l), likewise.
        core: (k, l) float64.
        floor: the most that ‖core‖_F may be off, before its own rounding.
    """

    q_b: Array
    q_a: Array
    core: Array
    floor: float

    @property
    def norm(self) -> float:
        """‖·‖_F; 0 if it cannot be told from 0."""
        found = float(np.linalg.norm(self.core))
        return found if found > self.floor else 0.0


def core_of(b: Array, a: Array, weights: Array) -> Core:
    """Return the core of b @ diag(weights) @ a.

    Args:
        b: (out, r) finite.
        a: (r, in) finite.
        weights: (r,) float64.
    """
    (b, b_power), (a, a_power) = _normalised(b), _normalised(a)
    q_b, r_b = _orthogonalised(b)
    q_a, r_a = _orthogonalised(np.ascontiguousarray(a.T))
    weighted = _times(r_b, Pair(weights[None, :], np.zeros((1, len(weights)))))
    # Row k of the sum has the terms weighted[:, k] · r_a[:, k]ᵀ; sums over k run in a tree.
    core = np.empty((len(r_b.high), len(r_a.high)))
    for row in range(len(r_b.high)):
        terms = _times(
            Pair(weighted.high[row][:, None], weighted.low[row][:, None]), r_a.transposed
        )
        core[row] = _total(terms).high
    sizes = np.linalg.norm(b, axis=0) * np.linalg.norm(a, axis=1) * np.abs(weights)
    floor = (b.shape[0] + a.shape[1] + len(weights)) * _ERROR * float(sizes.sum())
    power = b_power + a_power
    return Core(q_b, q_a, np.ldexp(core, power), float(np.ldexp(floor, power)))


def _normalised(factor: Array) -> tuple[Array, int]:
    """Return a factor whose largest number is about 1, and the power of two that was taken out."""
    wide = factor.astype(np.float64)
    largest = float(np.abs(wide).max(initial=0.0))
    power = math.frexp(largest)[1] if largest else 0
    return np.ldexp(wide, -power), power


def triplets_of(core: Core) -> tuple[Array, Array, Array]:
    """Return U (out, k), S (k,) and Vᵀ (k, in) of a core; zeros where it cannot be told from 0."""
    u, s, vt = np.linalg.svd(core.core, full_matrices=False)
    return core.q_b @ u, np.where(s > core.floor, s, 0.0), vt @ core.q_a.T
