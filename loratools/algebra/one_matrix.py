"""One matrix ΔW = scale · b @ a, taken apart once and asked for spectra, factors and errors.

Chooses between the Gram route and QR: Gram for factors stored in 32 bits or fewer, whose rounding
hides its floor; QR for float64 factors, for devices without float64, and where terms cancel so that
Gram matrices lose too much. Factors whose terms nearly cancel are taken apart in more bits than
float64 has. Factors of a higher rank than their product can have are multiplied out first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from loratools.algebra import cancelling, linalg, residuals
from loratools.algebra.device import Device, to_numpy
from loratools.algebra.once import once
from loratools_formats.core.dtypes import Array


@dataclass(frozen=True)
class RandomisedSvd:
    """Parameters of the randomised SVD: oversampling p, power iterations q, and a seed."""

    oversample: int
    power_iterations: int
    seed: int


class Decomposed(Protocol):
    """A matrix that can be asked for its spectrum, for factors, and for their error."""

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F."""

    @property
    def singular_values(self) -> Array:
        """Those that are known, descending."""

    def factors(self, rank: int, randomised: RandomisedSvd | None = None) -> tuple[Array, Array]:
        """Return the best (b, a) of a rank, balanced, of scale 1, padded with zeros if need be."""

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖ΔW − b @ a‖²_F."""


class Matrix:
    """One matrix of a delta.

    Args:
        b: (out, r), float32 or float64, finite.
        a: (r, in).
        scale: multiplies b @ a.
        device: where to compute.
        use_gram: whether the floor of the Gram route is below the rounding of the factors.
        known: Gram matrices of b and a, where the caller has computed them.
    """

    def __init__(
        self,
        b: Array,
        a: Array,
        scale: float,
        device: Device,
        use_gram: bool,
        known: linalg.Grams | None = None,
    ) -> None:
        self._b, self._a = device.put(b), device.put(a)
        self._rank = self._a.shape[0]
        self._scale = scale
        self._device = device
        on_cpu = isinstance(self._b, np.ndarray)
        if self._rank > min(self._b.shape[0], self._a.shape[1]):
            sizes = linalg.squared_sizes(self._b, self._a)
            product = linalg.multiplied_out(self._b, self._a)
            self._grams = linalg.grams(*product)
            found = cancelling.Cancellation(self._grams.squared_norm, sizes)
        else:
            self._grams = known if known and on_cpu else linalg.grams(self._b, self._a)
            found, product = cancelling.Cancellation.of(self._grams), None
        use_gram = use_gram and device.has_float64
        self._terms = found.terms
        self._cancels = found.cancels
        self._needs_more_bits = self._cancels and not (use_gram and found.is_enough)
        self._use_gram = use_gram and not self._cancels
        if product is not None and not self._needs_more_bits:
            self._b, self._a = product

    @once
    def _exact(self) -> cancelling.Core:
        """The core of factors that nearly cancel."""
        b, a = to_numpy(self._b), to_numpy(self._a)
        return cancelling.core_of(b, a, np.full(len(a), self._scale))

    @once
    def _triplets(self) -> tuple[Array, Array, Array]:
        return cancelling.triplets_of(self._exact)

    @once
    def _core(self) -> linalg.GramCore:
        return linalg.gram_core(self._grams, self._scale)

    @once
    def _qr(self) -> linalg.Factors:
        return linalg.qr_factors(self._b, self._a, self._scale, self._a.shape[0])

    def dense(self) -> Array:
        """Return ΔW: (out, in) float64."""
        b, a = (to_numpy(x).astype(np.float64, copy=False) for x in (self._b, self._a))
        product: Array = self._scale * (b @ a)
        return product

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F."""
        if self._needs_more_bits:
            return self._exact.norm**2
        if self._cancels:
            return float((to_numpy(self._qr.singular_values) ** 2).sum())
        return self._scale * self._scale * self._grams.squared_norm

    @property
    def singular_values(self) -> Array:
        """(r,): descending; zeros where the shape allows fewer."""
        values = np.zeros(self._rank)
        if self._needs_more_bits:
            found = self._triplets[1]
        else:
            found = self._core.singular_values if self._use_gram else self._qr.singular_values
        values[: found.shape[0]] = to_numpy(found)
        return values

    def factors(self, rank: int, randomised: RandomisedSvd | None = None) -> tuple[Array, Array]:
        """Return the best (b, a) of a rank, balanced, of scale 1, padded with zeros if need be."""
        if self._needs_more_bits:
            u, s, vt = (part.copy() for part in self._triplets)
            root = np.sqrt(s[:rank])
            return padded(*signed(u[:, :rank] * root, root[:, None] * vt[:rank]), rank)
        if randomised is not None and not self._cancels:
            found = linalg.rsvd_factors(
                self._b,
                self._a,
                self._scale,
                rank,
                oversample=randomised.oversample,
                power_iterations=randomised.power_iterations,
                seed=randomised.seed,
            )
        elif self._use_gram:
            found = linalg.gram_factors(self._b, self._a, self._core, rank)
        else:
            found = linalg.Factors(
                self._qr.b[:, :rank], self._qr.a[:rank, :], self._qr.singular_values[:rank]
            )
        return padded(to_numpy(found.b), to_numpy(found.a), rank)

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖ΔW − b @ a‖²_F; an upper bound of it where the factors nearly cancel."""
        if self._needs_more_bits:
            return self._bounded_error(b, a) ** 2
        new_b, new_a = self._device.put(b), self._device.put(a)
        if self._cancels:
            error = residuals.difference_norm(self._b, self._a, self._scale, new_b, new_a)
            return (
                error + abs(self._scale) * residuals.qr_floor(self._b, self._a, self._terms)
            ) ** 2
        error, _ = residuals.residual_norm(self._b, self._a, self._scale, self._grams, new_b, new_a)
        return error**2

    def _bounded_error(self, b: Array, a: Array) -> float:
        old_b, old_a = to_numpy(self._b), to_numpy(self._a)
        core = cancelling.core_of(
            np.concatenate([old_b, b], axis=1, dtype=np.float64),
            np.concatenate([old_a, a], dtype=np.float64),
            np.concatenate([np.full(len(old_a), self._scale), np.full(len(a), -1.0)]),
        )
        norm = float(np.linalg.norm(core.core))
        return 0.0 if norm <= core.floor and not self._exact.norm else norm + core.floor


def padded(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    """Return factors of exactly `rank` by adding zero columns to b and zero rows to a."""
    missing = rank - a.shape[0]
    if missing <= 0:
        return b, a
    return np.pad(b, ((0, 0), (0, missing))), np.pad(a, ((0, missing), (0, 0)))


def signed(b: Array, a: Array) -> tuple[Array, Array]:
    """Return factors with the sign of each column of b such that its largest entry is positive."""
    signs = column_signs(b)
    return b * signs, a * signs[:, None]


def column_signs(b: Array) -> Array:
    """Return the signs, (k,), with which the largest entry of each column is positive."""
    return np.where(-b.min(axis=0) > b.max(axis=0), -1.0, 1.0)


Method = Literal["exact", "rsvd"]
