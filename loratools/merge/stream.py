"""The best factors of a matrix that is only seen a block of rows at a time.

A randomised range finder on the rows' side (Halko, Martinsson, Tropp, arXiv 0909.4061) with power
iterations, seeded. Its error is not estimated: ‖X‖²_F is summed on the way, and for any orthonormal
V, the best factors of X·V·Vᵀ leave exactly ‖X‖² − Σ σᵢ² behind.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_DENSE_SIDE = 512


class RowStore:
    """Rows of a float32 matrix in an anonymous file, written once and read in blocks.

    Args:
        shape: (m, n).
        folder: where the file is made.
    """

    def __init__(self, shape: tuple[int, int], folder: Path | None) -> None:
        self.shape = shape
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self.squared_norm = 0.0
        self._spans: list[tuple[int, int]] = []

    def append(self, rows: Array) -> None:
        """Add rows below those already there, rounded to float32."""
        start = self._spans[-1][1] if self._spans else 0
        stored = np.ascontiguousarray(rows, dtype=np.float32)
        self._file.write(stored.view(np.uint8).reshape(-1).data)
        self.squared_norm += float(np.sum(stored.astype(np.float64) ** 2))
        self._spans.append((start, start + len(rows)))

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield (start, stop, rows in float64) in order."""
        width = 4 * self.shape[1]
        for start, stop in self._spans:
            self._file.seek(start * width)
            data = self._file.read((stop - start) * width)
            rows = np.frombuffer(data, np.float32).reshape(stop - start, self.shape[1])
            yield start, stop, rows.astype(np.float64)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


@dataclass(frozen=True)
class StreamedSvd:
    """Leading singular triplets of a streamed matrix.

    Attributes:
        u: (m, k).
        singular_values: (k,), descending.
        vt: (k, n).
        squared_norm: ‖X‖²_F of the whole matrix.
    """

    u: Array
    singular_values: Array
    vt: Array
    squared_norm: float


def streamed_svd(store: RowStore, width: int, *, power_iterations: int, seed: int) -> StreamedSvd:
    """Return up to `width` leading triplets; all of them, exactly, if the matrix is small.

    Args:
        store: the matrix X.
        width: number of triplets to look for, oversampling included.
        power_iterations: passes over X are 2 more than this.
        seed: of the random start.
    """
    rows, columns = store.shape
    if min(rows, columns) <= max(width, _DENSE_SIDE):
        return _exact(store)
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((columns, width)))
    for _ in range(power_iterations):
        image = np.zeros((columns, width))
        for _, _, block in store.blocks():
            image += block.T @ (block @ basis)
        basis, _ = np.linalg.qr(image)
    product = np.empty((rows, width))
    for start, stop, block in store.blocks():
        product[start:stop] = block @ basis
    u, s, inner = np.linalg.svd(product, full_matrices=False)
    return StreamedSvd(u, s, inner @ basis.T, store.squared_norm)


def _exact(store: RowStore) -> StreamedSvd:
    """Reduce the long side by QR of blocks, then decompose what is left."""
    rows, columns = store.shape
    if rows <= columns:
        whole = np.concatenate([block for _, _, block in store.blocks()])
        q, r = np.linalg.qr(whole.T)
        u, s, vt = np.linalg.svd(r.T, full_matrices=False)
        return StreamedSvd(u, s, vt @ q.T, store.squared_norm)
    gathered = np.empty((0, columns))
    for _, _, block in store.blocks():
        gathered = np.asarray(np.linalg.qr(np.concatenate([gathered, block]), mode="r"))
    _, s, vt = np.linalg.svd(gathered, full_matrices=False)
    inverse = np.where(s > 1e-12 * max(s[0], 1e-300), 1.0 / np.maximum(s, 1e-300), 0.0)
    u = np.concatenate([block @ (vt.T * inverse) for _, _, block in store.blocks()])
    return StreamedSvd(u, s, vt, store.squared_norm)


def squared_residual(store: RowStore, b: Array, a: Array) -> float:
    """Return ‖X − b @ a‖²_F, summed block by block."""
    return sum(
        float(np.sum((block - b[start:stop] @ a) ** 2)) for start, stop, block in store.blocks()
    )
