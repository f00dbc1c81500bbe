"""One matrix as a product of thin factors, with the questions that diagnostics ask of it.

Spectra come from Gram matrices or QR of the factors, row and column energies from the factors and
one Gram matrix. Where a change is not of low rank, the factors are its leading part, `tail` is the
energy of the rest, and only `dense` gives all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from loratools.algebra import cancelling, linalg
from loratools.algebra.once import once
from loratools_formats.core.dtypes import Array

_BLOCK_ELEMENTS = 1 << 20
_ENERGY_BLOCK = 1024
_HOLDS = 1e-14, 1e14
"""Squared sizes of components whose products float32 holds."""
_LEAST_SHARE = 0.1
"""Of Σ‖bᵢ‖²‖aᵢ‖², below which energies are summed in float64, since their terms cancel."""


class Thin:
    """ΔW = scale · b @ a, and what is known to be missing from it.

    Args:
        b: (out, r), float32 or float64, finite.
        a: (r, in).
        scale: multiplies b @ a.
        use_gram: whether the floor of the Gram route (1e-8 of σ₁) is below the factors' rounding.
        tail: ‖·‖²_F of the part of the change that the factors leave out; 0 if nothing.
        whole: returns all of the change, where the factors are not exactly it.
    """

    def __init__(
        self,
        b: Array,
        a: Array,
        scale: float = 1.0,
        *,
        use_gram: bool = True,
        tail: float = 0.0,
        whole: Callable[[], Array] | None = None,
    ) -> None:
        self.b, self.a, self.scale, self.tail = b, a, scale, tail
        self._use_gram = use_gram
        self._whole = whole

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.b), self.a.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of b."""
        return len(self.a)

    @once
    def grams(self) -> linalg.Grams:
        """The Gram matrices of both factors."""
        return linalg.grams(self.b, self.a)

    @once
    def _cancellation(self) -> cancelling.Cancellation:
        return cancelling.Cancellation.of(self.grams)

    @property
    def _cancels(self) -> bool:
        return self._cancellation.cancels

    @property
    def _needs_more_bits(self) -> bool:
        return self._cancels and not (self._use_gram and self._cancellation.is_enough)

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F, the tail included."""
        if self._needs_more_bits:
            return self._exact.norm**2 + self.tail
        if self._cancels:
            return float((self.svd[1] ** 2).sum()) + self.tail
        return self.scale * self.scale * self.grams.squared_norm + self.tail

    @once
    def _exact(self) -> cancelling.Core:
        return cancelling.core_of(self.b, self.a, np.full(self.rank, self.scale))

    @once
    def singular_values(self) -> Array:
        """(min(r, out, in),) float64, descending; without those of the tail."""
        count = min(self.rank, *self.shape)
        if self._use_gram and not self._cancels:
            values: Array = linalg.gram_core(self.grams, self.scale).singular_values[:count]
            return values
        return self.svd[1][:count]

    @once
    def svd(self) -> tuple[Array, Array, Array]:
        """U (out, k), S (k,), Vᵀ (k, in) in float64, by QR of both factors where that is enough."""
        if self._needs_more_bits:
            u, values, v = cancelling.triplets_of(self._exact)
            count = min(self.rank, *self.shape)
            return u[:, :count], values[:count], v[:count]
        q_b, r_b = np.linalg.qr(self.b.astype(np.float64, copy=False))
        q_a, r_a = np.linalg.qr(self.a.T.astype(np.float64, copy=False))
        u, s, vt = np.linalg.svd(self.scale * (r_b @ r_a.T), full_matrices=False)
        return q_b @ u, s, vt @ q_a.T

    def spaces(self) -> tuple[Array, Array]:
        """Return orthonormal bases of ΔW's columns (out, k) and rows (in, k), without rounding."""
        u, s, vt = self.svd
        kept = s > s[0] * max(self.shape) * np.finfo(np.float64).eps if len(s) else s > 0.0
        return u[:, kept], vt[kept].T

    def row_energies(self) -> Array:
        """Return ‖row‖² of the factors' product: (out,) float64, to about 1e-6 of each."""
        b = self._for_energies(self.b)
        gram = self.grams.a.astype(b.dtype)
        energies = np.empty(len(b))
        for start in range(0, len(b), _ENERGY_BLOCK):
            part = b[start : start + _ENERGY_BLOCK]
            energies[start : start + len(part)] = np.einsum("ij,ij->i", part @ gram, part)
        return self.scale * self.scale * np.maximum(energies, 0.0)

    def column_energies(self) -> Array:
        """Return ‖column‖² of the factors' product: (in,) float64, to about 1e-6 of each."""
        a = self._for_energies(self.a)
        gram = self.grams.b.astype(a.dtype)
        energies = np.empty(a.shape[1])
        for start in range(0, a.shape[1], _ENERGY_BLOCK):
            part = a[:, start : start + _ENERGY_BLOCK]
            product = gram @ part
            product *= part
            energies[start : start + part.shape[1]] = product.sum(axis=0)
        return self.scale * self.scale * np.maximum(energies, 0.0)

    def _for_energies(self, factor: Array) -> Array:
        """Return a factor in float32, which is twice as fast, if its products hold in it."""
        of_b, of_a = np.diag(self.grams.b), np.diag(self.grams.a)
        sizes = np.concatenate([of_b, of_a])
        low, high = _HOLDS
        terms = float((of_b * of_a).sum())
        holds = (((sizes > low) & (sizes < high)) | (sizes == 0.0)).all()
        narrow = holds and self.grams.squared_norm >= _LEAST_SHARE * terms
        return factor.astype(np.float32 if narrow else np.float64, copy=False)

    @property
    def is_product(self) -> bool:
        """Whether the factors are all of the change."""
        return self._whole is None

    def dense(self) -> Array:
        """Return all of the change in an array of its own: (out, in) float64."""
        if self._whole is not None:
            return self._whole()
        product: Array = self.scale * (self.b.astype(np.float64, copy=False) @ self.a)
        return product

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield (start, stop, rows of the product in float64) in order."""
        height = max(1, _BLOCK_ELEMENTS // self.shape[1])
        a = self.scale * self.a.astype(np.float64, copy=False)
        for start in range(0, len(self.b), height):
            yield start, start + height, self.b[start : start + height].astype(np.float64) @ a

    def entries(self, rows: Array, columns: Array) -> Array:
        """Return the entries of the product at (rows, columns): (S,) float64."""
        values: Array = self.scale * np.einsum(
            "ij,ij->i",
            self.b[rows].astype(np.float64, copy=False),
            self.a[:, columns].T.astype(np.float64, copy=False),
        )
        return values


def inner(one: Thin, other: Thin) -> float:
    """Return ⟨ΔW₁, ΔW₂⟩_F of the factors."""
    return one.scale * other.scale * linalg.inner(one.b, one.a, other.b, other.a)


def cosine(product: float, squared_one: float, squared_other: float) -> float | None:
    """Return ⟨x, y⟩/(‖x‖‖y‖), None if either is zero."""
    norms = math.sqrt(squared_one) * math.sqrt(squared_other)
    return min(1.0, max(-1.0, product / norms)) if norms > 0.0 else None
