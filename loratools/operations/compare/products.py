"""Inner products of the changes of one module, all adapters at once.

⟨ΔWᵢ, ΔWⱼ⟩ = Σ (BᵢᵀBⱼ) ∘ (AᵢAⱼᵀ), so that two Gram matrices of all factors side by side hold every
pair. They are of float64 for a few adapters, and of float32 within blocks of rows for many, which
takes half the time. Where the terms of a sum cancel, so that Gram matrices would hide what is left,
the factors are orthogonalised first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from loratools.algebra.linalg import gram, gram_in_single
from loratools.algebra.thin import Thin
from loratools.folding.thin_modules import ThinModule
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError

MANY = 16
"""From this many adapters on, products are float32 within blocks: cosines are good to 1e-6."""

_LEAST_SHARE, _LEAST_IN_SINGLE = 1e-4, 0.1
"""Of Σ‖bᵢ‖²‖aᵢ‖², below which ‖ΔW‖² is too small for sums of float64, and of float32."""


def inner_products(modules: Sequence[ThinModule]) -> tuple[Array, list[Array]]:
    """Return ⟨ΔWᵢ, ΔWⱼ⟩ summed over experts, (N, N), and the Gram matrix of all rows of A of each.

    Raises:
        AdapterError: squares of the factors overflow float64.
    """
    count = len(modules)
    changes, grams = np.zeros((count, count)), []
    for stack in zip(*(module.matrices for module in modules), strict=True):
        found, gram_a = _of_matrices(list(stack))
        if not np.isfinite(found).all():
            raise AdapterError("squares of the factors overflow float64", tensor=modules[0].name)
        changes += found
        grams.append(gram_a)
    return (changes + changes.T) / 2.0, grams


def _of_matrices(stack: list[Thin]) -> tuple[Array, Array]:
    if len(stack) >= MANY:
        found, gram_a, shares = _by_grams(stack, single=True)
        if shares.min() >= _LEAST_IN_SINGLE:
            return found, gram_a
    found, gram_a, shares = _by_grams(stack, single=False)
    _orthogonalise(found, stack, np.flatnonzero(shares < _LEAST_SHARE))
    return found, gram_a


def _by_grams(stack: Sequence[Thin], *, single: bool) -> tuple[Array, Array, Array]:
    """Return the products, the Gram matrix of A, and ‖ΔWᵢ‖²/Σ‖b‖²‖a‖² of each, 1 of nothing."""
    ranks = [thin.rank for thin in stack]
    starts = np.cumsum([0, *ranks[:-1]])
    of_b, powers_b = _stacked([thin.b.T for thin in stack], single)
    of_a, powers_a = _stacked([thin.a for thin in stack], single)
    product = gram_in_single if single else gram
    both, gram_a = product(of_b.T), product(of_a.T)
    terms = np.add.reduceat(np.diag(both) * np.diag(gram_a), starts)
    both *= gram_a
    sums = np.add.reduceat(np.add.reduceat(both, starts, axis=0), starts, axis=1)
    shares = np.divide(np.diag(sums), terms, out=np.ones(len(stack)), where=terms > 0.0)
    sizes = np.ldexp([thin.scale for thin in stack], powers_b + powers_a)
    found: Array = sums * np.multiply.outer(sizes, sizes) + np.diag([thin.tail for thin in stack])
    if powers_a.any():
        scaled = np.repeat(np.ldexp(1.0, powers_a), ranks)
        gram_a *= scaled
        gram_a *= scaled[:, None]
    return found, gram_a, shares


def _stacked(factors: Sequence[Array], single: bool) -> tuple[Array, Array]:
    """Return the rows of all factors, (R, n), each over a power of two where they become float32.

    Args:
        factors: (rᵢ, n) each.
        single: whether they become float32.
    """
    powers = np.zeros(len(factors), int)
    if not single:
        return np.concatenate(factors, dtype=np.float64), powers
    stacked = np.empty((sum(map(len, factors)), factors[0].shape[1]), np.float32)
    start = 0
    for place, factor in enumerate(factors):
        largest = max(float(factor.max()), -float(factor.min())) if factor.size else 0.0
        powers[place] = math.frexp(largest)[1]
        part = stacked[start : start + len(factor)]
        np.multiply(factor, math.ldexp(1.0, -int(powers[place])), out=part, casting="same_kind")
        start += len(factor)
    return stacked, powers


def _orthogonalise(found: Array, stack: Sequence[Thin], places: Array) -> None:
    """Compute the products with some matrices anew, in place, from singular triplets."""
    for i in places:
        u, s, vt = stack[i].svd
        for j, other in enumerate(stack):
            b, a = other.scale * other.b, other.a
            if j in places:
                other_u, other_s, a = other.svd
                b = other_u * other_s
            found[i, j] = found[j, i] = np.sum(((u * s).T @ b) * (vt @ a.T))
        found[i, i] = stack[i].squared_norm
