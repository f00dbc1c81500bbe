"""‖Δ − Δ'‖ of two products of factors, without forming either.

Gram matrices give it where it stands out of their cancellation, QR of the stacked factors where it
does not. What rounding alone leaves of the latter is known too, so that an error can be reported
as an upper bound.

Shapes: `b: (out, r)`, `a: (r, in)`, both real floating.
"""

from __future__ import annotations

import math

from loratools.algebra.linalg import Array, Grams, concatenate, grams, inner, namespace, wide

_GRAM_ERROR_FLOOR = 700.0  # times √ε: 1e-5 in float64


def residual_norm(
    b: Array, a: Array, scale: float, both: Grams, new_b: Array, new_a: Array
) -> tuple[float, float]:
    """Return (‖Δ − Δ'‖, ‖Δ‖) for Δ = scale · b @ a, Δ' = new_b @ new_a.

    From Gram matrices; where the difference is so small that their cancellation shows, by QR of
    the stacked factors instead.

    Args:
        b: (out, r).
        a: (r, in).
        scale: of the first product.
        both: Gram matrices of b and a.
        new_b: (out, k).
        new_a: (k, in).
    """
    squared = scale * scale * both.squared_norm
    new_squared = grams(new_b, new_a).squared_norm
    difference = squared + new_squared - 2.0 * scale * inner(b, a, new_b, new_a)
    norm = math.sqrt(squared)
    xp = namespace(b)
    floor = _GRAM_ERROR_FLOOR * math.sqrt(float(xp.finfo(both.b.dtype).eps))
    if difference <= (floor * norm) ** 2:
        return difference_norm(b, a, scale, new_b, new_a), norm
    return math.sqrt(difference), norm


def difference_norm(b: Array, a: Array, scale: float, new_b: Array, new_a: Array) -> float:
    """Return ‖scale · b @ a − new_b @ new_a‖_F by QR of the stacked factors."""
    xp = namespace(b)
    stacked_b, stacked_a = concatenate([(scale, b, a), (-1.0, new_b, new_a)])
    _, r_b = xp.linalg.qr(stacked_b)
    _, r_a = xp.linalg.qr(stacked_a.T)
    return float(xp.sqrt(xp.sum((r_b @ r_a.T) ** 2)))


def qr_floor(b: Array, a: Array, terms: float) -> float:
    """Return what rounding leaves of ‖b @ a − b @ a‖_F by QR, roundings as far apart as at random.

    Args:
        b: (out, r).
        a: (r, in).
        terms: Σ‖bᵢ‖²‖aᵢ‖².
    """
    eps = float(namespace(b).finfo(wide(b)).eps)
    return 4.0 * eps * math.sqrt((sum(b.shape) + sum(a.shape)) * terms)
