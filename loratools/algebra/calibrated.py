"""The best factors of a rank for given inputs: least ‖(ΔW − ΔW')·X‖ in place of ‖ΔW − ΔW'‖.

Of the inputs, only the second moments C = X·Xᵀ count. With C = L·Lᵀ, the error is
‖(ΔW − ΔW')·L‖, so that ΔW'·L is the truncated ΔW·L (Eckart–Young), and with the left singular
vectors U of ΔW·L, ΔW' = U·Uᵀ·ΔW. Left singular vectors of b·a·L depend on L only through the
(r, r) matrix a·C·aᵀ, so nothing larger is decomposed, and C need not be invertible.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Matrix, RandomisedSvd
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError

_LEAST = -1e-5  # of the largest eigenvalue: what float32 sums may leave of one that is zero


class Calibrated:
    """One matrix of a delta with the second moments of its inputs.

    Its singular values are those of ΔW·L, which decide ranks; its errors are those of ΔW.

    Args:
        b: (out, r), finite.
        a: (r, in).
        scale: multiplies b @ a.
        moments: (in, in), symmetric; or its diagonal, (in,).
        device: where to compute.
        use_gram: as for `Matrix`.

    Raises:
        AdapterError: the moments are of no inputs.
    """

    def __init__(
        self, b: Array, a: Array, scale: float, moments: Array, device: Device, use_gram: bool
    ) -> None:
        self._b, self._a, self._scale, self._moments = b, a, scale, moments
        self._device = device
        self._plain = Matrix(b, a, scale, device, use_gram)
        self._weighted = Matrix(b, _root(_inner(a, moments)), scale, device, use_gram)

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F."""
        return self._plain.squared_norm

    @property
    def squared_output(self) -> float:
        """‖ΔW·X‖²_F."""
        return self._weighted.squared_norm

    @property
    def singular_values(self) -> Array:
        """(r,): those of ΔW·L, descending."""
        return self._weighted.singular_values

    def factors(self, rank: int, randomised: RandomisedSvd | None = None) -> tuple[Array, Array]:
        """Return the (b, a) of a rank that are best for the inputs, balanced, of scale 1."""
        left, _ = self._weighted.factors(rank, randomised)
        sizes = np.linalg.norm(left, axis=0)
        left = left[:, sizes > 0.0] / sizes[sizes > 0.0]
        if not left.shape[1]:  # no inputs, as of an expert that none reached: all serve them alike
            return self._plain.factors(rank, randomised)
        left, _ = np.linalg.qr(left)
        right = self._scale * ((left.T @ self._b) @ self._a.astype(np.float64, copy=False))
        return Matrix(left, right, 1.0, self._device, use_gram=False).factors(rank)

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖ΔW − b @ a‖²_F."""
        return self._plain.squared_error(b, a)

    def squared_output_error(self, b: Array, a: Array) -> float:
        """Return ‖(ΔW − b @ a)·X‖²_F."""
        lefts = np.concatenate([self._scale * self._b.astype(np.float64), -b], axis=1)
        rights = np.concatenate([self._a.astype(np.float64), a])
        triangle = np.linalg.qr(lefts, mode="r")
        squared = np.sum((triangle @ _inner(rights, self._moments)) * triangle)
        return max(float(squared), 0.0)


def _inner(a: Array, moments: Array) -> Array:
    """Return a·C·aᵀ in float64: (r, r)."""
    wide, c = a.astype(np.float64, copy=False), moments.astype(np.float64, copy=False)
    found: Array = (wide * c if c.ndim == 1 else wide @ c) @ wide.T
    return 0.5 * (found + found.T)


def _root(square: Array) -> Array:
    """Return R with Rᵀ in place of a·L: (r, r) with R·Rᵀ the given matrix.

    Raises:
        AdapterError: it has negative eigenvalues, so no inputs have these moments.
    """
    if not np.isfinite(square).all():
        raise AdapterError("second moments of the inputs hold NaN or infinite values")
    values, vectors = np.linalg.eigh(square)
    if values[0] < _LEAST * max(values[-1], 0.0) or not math.isfinite(values[-1]):
        raise AdapterError(
            "the second moments of the inputs have negative eigenvalues",
            got=f"{values[0]:.3g}",
            expected="the eigenvalues of X·Xᵀ, none of which is negative",
        )
    root: Array = vectors * np.sqrt(np.maximum(values, 0.0))
    return root
