"""Inner products of the changes of one module, all adapters at once.

⟨ΔWᵢ, ΔWⱼ⟩ = Σ (BᵢᵀBⱼ) ∘ (AᵢAⱼᵀ), so that two Gram matrices of all factors side by side hold every
pair. They are of float64 for a few adapters, and of float32 within blocks of rows for many, which
takes half the time. Where the terms of a sum cancel, so that Gram matrices would hide what is left,
the factors are orthogonalised first.
"""

from __future__ import annotations

import math
import threading
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
"""Shares of Σ‖bᵢ‖²‖aᵢ‖²: a smaller ‖ΔW‖² is lost in sums of float64, and of float32."""


class Workspace(threading.local):
    """Memory of each thread that takes one module's factors after the other's.

    Fresh memory for every module costs more time than filling it.
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)

    def array(self, rows: int, columns: int) -> Array:
        """Return an array (rows, columns) of float32 with any values, the same memory each time."""
        if self._memory.size < rows * columns:
            self._memory = np.empty(rows * columns, np.float32)
        return self._memory[: rows * columns].reshape(rows, columns)


def inner_products(
    modules: Sequence[ThinModule], workspace: Workspace
) -> tuple[Array, list[Array]]:
    """Return ⟨ΔWᵢ, ΔWⱼ⟩ summed over experts, (N, N), and the Gram matrix of all rows of A of each.

    Args:
        modules: of one path and one shape.
        workspace: for factors side by side.

    Raises:
        AdapterError: squares of the factors overflow float64.
    """
    count = len(modules)
    changes, grams = np.zeros((count, count)), []
    for stack in zip(*(module.matrices for module in modules), strict=True):
        found, gram_a = _of_matrices(list(stack), workspace)
        if not np.isfinite(found).all():
            raise AdapterError("squares of the factors overflow float64", tensor=modules[0].name)
        changes += found
        grams.append(gram_a)
    return (changes + changes.T) / 2.0, grams


def _of_matrices(stack: list[Thin], workspace: Workspace) -> tuple[Array, Array]:
    if len(stack) >= MANY:
        found, gram_a, shares = _by_grams(stack, workspace)
        if shares.min() >= _LEAST_IN_SINGLE:
            return found, gram_a
    found, gram_a, shares = _by_grams(stack, None)
    _orthogonalise(found, stack, np.flatnonzero(shares < _LEAST_SHARE))
    return found, gram_a


def _by_grams(stack: Sequence[Thin], workspace: Workspace | None) -> tuple[Array, Array, Array]:
    """Return the products, the Gram matrix of A, and ‖ΔWᵢ‖²/Σ‖b‖²‖a‖² of each, 1 of nothing.

    With a workspace, sums are of float32.
    """
    ranks = [thin.rank for thin in stack]
    starts = np.cumsum([0, *ranks[:-1]])
    both, powers_b = _gram_of([thin.b.T for thin in stack], workspace)
    gram_a, powers_a = _gram_of([thin.a for thin in stack], workspace)
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


def _gram_of(factors: Sequence[Array], workspace: Workspace | None) -> tuple[Array, Array]:
    """Return the Gram matrix of the rows of all factors, (R, R), each factor over a power of two.

    Args:
        factors: (rᵢ, n) each.
        workspace: for their rows in float32; without it they stay as they are, over 1.
    """
    powers = np.zeros(len(factors), int)
    if workspace is None:
        return gram(np.concatenate(factors, dtype=np.float64).T), powers
    stacked = workspace.array(sum(map(len, factors)), factors[0].shape[1])
    start = 0
    for place, factor in enumerate(factors):
        largest = max(float(factor.max()), -float(factor.min())) if factor.size else 0.0
        powers[place] = math.frexp(largest)[1]
        part = stacked[start : start + len(factor)]
        np.multiply(factor, math.ldexp(1.0, -int(powers[place])), out=part, casting="same_kind")
        start += len(factor)
    return gram_in_single(stacked.T), powers


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
