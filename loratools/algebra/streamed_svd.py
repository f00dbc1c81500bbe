"""The best factors of a matrix that is only seen a block of rows at a time.

A randomised range finder on the rows' side (Halko, Martinsson, Tropp, arXiv 0909.4061) with power
iterations, seeded. Its error is not estimated: ‖X‖²_F is summed on the way, and for any orthonormal
V, the best factors of X·V·Vᵀ leave exactly ‖X‖² − Σ σᵢ² behind.

The rows come from an anonymous file, where making them is dear, or are made anew at each pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from loratools.algebra.one_matrix import RandomisedSvd, padded, signed
from loratools.work.scratch import AnonymousFile
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError

_DENSE_SIDE = 512
_DENSE_ELEMENTS = 1 << 23  # 64 MiB in float64
_BLOCK_ELEMENTS = 1 << 19
_MOST_PASSES = 16
_SETTLED = 1e-3  # of the squared error, from one pass to the next


class RowBlocks(Protocol):
    """A matrix that is read a block of rows at a time, as often as needed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def squared_norm(self) -> float:
        """‖X‖²_F."""

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield (start, stop, rows in float64) in order."""


class RowStore:
    """Rows of a float32 matrix in an anonymous file, written once and read in blocks.

    Args:
        shape: (m, n).
        folder: where the file is made.
    """

    def __init__(self, shape: tuple[int, int], folder: Path | None) -> None:
        self.shape = shape
        self._file = AnonymousFile(folder)
        self.squared_norm = 0.0
        self._spans: list[tuple[int, int]] = []

    def append(self, rows: Array) -> None:
        """Add rows below those already there, rounded to float32."""
        start = self._spans[-1][1] if self._spans else 0
        stored = np.ascontiguousarray(rows, dtype=np.float32)
        self._file.write_at(4 * self.shape[1] * start, stored.view(np.uint8).reshape(-1).data)
        self.squared_norm += float(np.sum(stored.astype(np.float64) ** 2))
        self._spans.append((start, start + len(rows)))

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield (start, stop, rows in float64) in order."""
        width = 4 * self.shape[1]
        for start, stop in self._spans:
            data = self._file.read_at(start * width, (stop - start) * width)
            rows = np.frombuffer(data, np.float32).reshape(stop - start, self.shape[1])
            yield start, stop, rows.astype(np.float64)


class RowSource:
    """Rows that a function makes anew at each pass.

    Args:
        shape: (m, n).
        rows: returns rows [start, stop) in float64.

    Raises:
        AdapterError: NaN, infinite or overflowing values.
    """

    def __init__(self, shape: tuple[int, int], rows: Callable[[int, int], Array]) -> None:
        self.shape = shape
        self._rows = rows
        with np.errstate(over="ignore", invalid="ignore"):
            self.squared_norm = sum(float(np.vdot(block, block)) for _, _, block in self.blocks())
        if not math.isfinite(self.squared_norm):
            raise AdapterError("the weight change overflows", hint="Is its scale right?")

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield (start, stop, rows in float64) in order."""
        for start, stop in row_spans(self.shape):
            yield start, stop, self._rows(start, stop)


def row_spans(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of rows, small enough to hold several of."""
    rows, columns = shape
    height = max(1, _BLOCK_ELEMENTS // columns)
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


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


def streamed_svd(
    source: RowBlocks, width: int, *, power_iterations: int | None, seed: int
) -> StreamedSvd:
    """Return up to `width` leading triplets; all of them, exactly, if the matrix is small.

    Args:
        source: the matrix X.
        width: number of triplets to look for, oversampling included.
        power_iterations: passes over X before the last one; None for as many as lessen the error
            by more than a thousandth.
        seed: of the random start.
    """
    rows, columns = source.shape
    is_small = min(rows, columns) <= _DENSE_SIDE and rows * columns <= _DENSE_ELEMENTS
    if is_small or min(rows, columns) <= width:
        return _exact(source)
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((columns, width)))
    captured = 0.0
    for _ in range(_MOST_PASSES if power_iterations is None else power_iterations):
        narrow = basis.astype(np.float32)
        image, before = np.zeros((columns, width)), captured
        captured = 0.0
        for _, _, block in source.blocks():
            if power_iterations is None:
                # The basis is only a direction to look in: float32 serves as well, twice as fast.
                single = block.astype(np.float32)
                product = single @ narrow
                image += single.T @ product
                captured += float(np.vdot(product, product))
            else:
                image += block.T @ (block @ basis)
        basis, _ = np.linalg.qr(image)
        if power_iterations is None and captured - before < _SETTLED * (
            source.squared_norm - captured
        ):
            break
    product = np.empty((rows, width))
    for start, stop, block in source.blocks():
        product[start:stop] = block @ basis
    u, s, inner = np.linalg.svd(product, full_matrices=False)
    return StreamedSvd(u, s, inner @ basis.T, source.squared_norm)


def _exact(source: RowBlocks) -> StreamedSvd:
    """Reduce the long side by QR of blocks, then decompose the small matrix."""
    rows, columns = source.shape
    if rows <= columns:
        whole = np.concatenate([block for _, _, block in source.blocks()])
        q, r = np.linalg.qr(whole.T)
        u, s, vt = np.linalg.svd(r.T, full_matrices=False)
        return StreamedSvd(u, s, vt @ q.T, source.squared_norm)
    gathered = np.empty((0, columns))
    for _, _, block in source.blocks():
        gathered = np.asarray(np.linalg.qr(np.concatenate([gathered, block]), mode="r"))
    _, s, vt = np.linalg.svd(gathered, full_matrices=False)
    inverse = np.where(s > 1e-12 * max(s[0], 1e-300), 1.0 / np.maximum(s, 1e-300), 0.0)
    u = np.concatenate([block @ (vt.T * inverse) for _, _, block in source.blocks()])
    return StreamedSvd(u, s, vt, source.squared_norm)


def squared_residual(source: RowBlocks, b: Array, a: Array) -> float:
    """Return ‖X − b @ a‖²_F, summed block by block."""
    return sum(
        float(np.sum((block - b[start:stop] @ a) ** 2)) for start, stop, block in source.blocks()
    )


class StreamedMatrix:
    """A streamed matrix with the same questions as `Matrix`.

    Args:
        source: its rows.
        svd: decomposes it, when the first question needs that.
    """

    def __init__(self, source: RowBlocks, svd: Callable[[], StreamedSvd]) -> None:
        self._source = source
        self._decompose = svd

    @functools.cached_property
    def _svd(self) -> StreamedSvd:
        return self._decompose()

    @property
    def squared_norm(self) -> float:
        """‖X‖²_F."""
        return self._source.squared_norm

    @property
    def singular_values(self) -> Array:
        """(k,): the leading ones, descending."""
        return self._svd.singular_values

    def factors(self, rank: int, _: RandomisedSvd | None = None) -> tuple[Array, Array]:
        """Return the best (b, a) of a rank, balanced, of scale 1."""
        svd = self._svd
        root = np.sqrt(svd.singular_values[:rank])
        b, a = svd.u[:, :rank] * root, root[:, None] * svd.vt[:rank]
        return padded(*signed(b, a), rank)

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖X − b @ a‖²_F."""
        return squared_residual(self._source, b, a)

    def blocks(self) -> Iterator[tuple[int, int, Array]]:
        """Yield (start, stop, rows in float64) in order."""
        return self._source.blocks()
