"""Products whose terms nearly cancel: ΔW = scale · b @ a far smaller than its columns and rows.

Gram matrices see ‖ΔW‖ only above √ε of Σ‖bᵢ‖‖aᵢ‖, QR in float64 above ε of it, at a hundredth of
what is said next. Where `cancels` says that the first may not be enough, and `is_enough` that the
second is not, QR in float64 is corrected by what it left out: b = Q_b R_b + rest_b, and a likewise,
with rests of about 100 bits. ΔW is then Q_b (R_b diag(w) R_aᵀ) Q_aᵀ, whose core cancels in about
100 bits and is rounded after that, and two products with a rest, which are small where they are
added. What lies below `floor` cannot be told from zero even so.

A product has about 100 bits if its factors are sliced into whole numbers so short that matrix
products of slices are exact in float64, whatever the order of their sums.

Sources: Ozaki et al. 2012 (slices), Knuth (sums), Dekker 1971 (products).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loratools.algebra.linalg import Grams, namespace
from loratools_formats.core.dtypes import Array

_LEAST_SHARE = 1e-3
"""Of Σ‖bᵢ‖²‖aᵢ‖², below which ‖ΔW‖² has cancelled; the Gram route then errs by 5e-7 of ‖ΔW‖."""

_LEAST_SHARE_FOR_QR = 1e-9
"""Of the same; QR in float64 then errs by about 1e-11 of ‖ΔW‖, far below what float32 can store."""

_ERROR = 2.0**-100
"""Of a term, by which slices and sums of about 100 bits may be off."""

_BITS = 108
"""Of a row's largest number, that slices keep."""

_ROWS = 1024
"""Of a product that are summed at once."""

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


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """Return x + y in float64, and what its rounding left out."""
    total = x + y
    back = total - x
    return total, (x - (total - back)) + (y - back)


def _two_product(x: Array, y: Array) -> tuple[Array, Array]:
    """Return x · y in float64, and what its rounding left out."""
    product = x * y
    (x1, x2), (y1, y2) = _halves(x), _halves(y)
    return product, ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2


def _halves(x: Array) -> tuple[Array, Array]:
    wide = _SPLIT * x
    high = wide - (wide - x)
    return high, x - high


def _slices(rows: Array, bits: int) -> Iterator[tuple[Array, Array]]:
    """Yield whole numbers (n, r) of so many bits, and the power of two of each row (n, 1).

    Their sum is `rows`, up to 2 ** -_BITS of the largest number of each row.
    """
    power = np.frexp(np.abs(rows).max(axis=1, keepdims=True))[1]
    left = np.ldexp(rows, -power)
    for done in range(bits, _BITS + bits, bits):
        if not left.any():
            return
        scaled = np.ldexp(left, bits)
        whole = np.rint(scaled)
        yield whole, power - done
        left = scaled - whole


def _plus_product(x: Array, left: Array, right: Array) -> Array:
    """Return x + left @ right, rounded to float64 after about 100 bits.

    Args:
        x: (n, m) float64.
        left: (n, r) float64.
        right: (r, m) float64.
    """
    bits = (53 - max(1, len(right) - 1).bit_length()) // 2
    of_right = [(whole.T, power.T) for whole, power in _slices(right.T, bits)]
    result = np.empty_like(x)
    for start in range(0, len(x), _ROWS):
        rows = slice(start, start + _ROWS)
        total, lost = x[rows], np.zeros_like(x[rows])
        for i, (of_left, power) in enumerate(_slices(left[rows], bits)):
            for j, (whole, other) in enumerate(of_right):
                if (i + j) * bits > _BITS:
                    break
                total, more = _two_sum(total, np.ldexp(of_left @ whole, power + other))
                lost += more
        result[rows] = total + lost
    return result


@dataclass(frozen=True)
class Core:
    """A product taken apart without cancellation: b @ diag(weights) @ a = q_b @ core @ q_a.T.

    Attributes:
        q_b: (out, k), orthonormal columns.
        q_a: (in, l), likewise.
        core: (k, l) float64; of no higher rank than r, up to `floor`.
        rank: r, the number of terms.
        floor: the most that ‖core‖_F may be off, before its own rounding.
    """

    q_b: Array
    q_a: Array
    core: Array
    rank: int
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
    (b, b_powers), (a, a_powers) = _normalised(b), _normalised(a.T)
    weights, powers = np.frexp(weights)
    powers = np.where(weights == 0.0, 0, powers + b_powers + a_powers)
    power = powers.max(initial=0)
    weights = np.ldexp(weights, powers - power)
    (q_b, r_b), (q_a, r_a) = np.linalg.qr(b), np.linalg.qr(a)
    rest_b, rest_a = _plus_product(b, -q_b, r_b), _plus_product(a, -q_a, r_a)
    weighted, lost = _two_product(r_b, weights[None, :])
    inner = _plus_product(lost @ r_a.T, weighted, r_a.T)
    from_b, from_a = rest_b @ (weights[:, None] * r_a.T), rest_a @ weighted.T
    # b diag(w) aᵀ = q_b inner q_aᵀ + from_b q_aᵀ + q_b from_aᵀ, but for both rests' product.
    u, t = np.linalg.qr(np.hstack([q_b, from_b]))
    v, z = np.linalg.qr(np.hstack([q_a, from_a]))
    (of_b, of_rest_b), (of_a, of_rest_a) = _parted(t, len(r_b)), _parted(z, len(r_a))
    core = of_b @ inner @ of_a.T + (of_rest_b @ of_a.T + of_b @ of_rest_a.T)
    floor = _floor(b, a, weights, rest_b, rest_a)
    return Core(u, v, np.ldexp(core, power), len(weights), float(np.ldexp(floor, power)))


def _parted(columns: Array, count: int) -> tuple[Array, Array]:
    return columns[:, :count], columns[:, count:]


def _floor(b: Array, a: Array, weights: Array, rest_b: Array, rest_a: Array) -> float:
    """Return the most by which rounding and the product of the rests may have changed the core."""
    of_b, of_a, of_rest_b, of_rest_a = (
        np.linalg.norm(part, axis=0) for part in (b, a, rest_b, rest_a)
    )
    of_b = of_b * np.abs(weights)
    steps = len(b) + len(a) + len(weights)
    rounded = 2.0**-53 * (of_rest_b * np.abs(weights) * of_a + of_b * of_rest_a)
    return float((steps * (_ERROR * of_b * of_a + 4.0 * rounded)).sum()) + float(
        (of_rest_b * np.abs(weights) * of_rest_a).sum()
    )


def _normalised(columns: Array) -> tuple[Array, Array]:
    """Return columns whose largest numbers are about 1, and the powers of two that were taken out.

    Slices of a row would else keep no more of short columns than long ones leave over.
    """
    wide = columns.astype(np.float64)
    powers = np.frexp(np.abs(wide).max(axis=0, initial=0.0))[1]
    return np.ldexp(wide, -powers), powers


def triplets_of(core: Core) -> tuple[Array, Array, Array]:
    """Return U (out, k), S (k,) and Vᵀ (k, in) of a core; zeros where it cannot be told from 0."""
    u, s, vt = np.linalg.svd(core.core, full_matrices=False)
    u, s, vt = u[:, : core.rank], s[: core.rank], vt[: core.rank]
    return core.q_b @ u, np.where(s > core.floor, s, 0.0), vt @ core.q_a.T
