"""The best factors of a matrix that is only seen a block of rows at a time.

A seeded, randomised block Krylov iteration on the rows' side (Halko, Martinsson, Tropp, arXiv
0909.4061; Musco, Musco, arXiv 1504.05477). Its error is not estimated: ‖X‖²_F is summed on the way,
and for any orthonormal V, the best factors of X·V·Vᵀ leave exactly ‖X‖² − Σ σᵢ² behind.

The passes that look for directions compute in float32, the last one, which gives the triplets, in
float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from loratools.algebra.once import once
from loratools.algebra.one_matrix import RandomisedSvd, padded, signed
from loratools.algebra.row_blocks import RowBlocks, over_rows, row_spans, squared_residual
from loratools_formats.core.dtypes import Array

_DENSE_SIDE = 512
_DENSE_ELEMENTS = 1 << 23  # 64 MiB in float64
_MOST_PASSES = 16
_SETTLED = 5e-3  # of the squared error, in a pass, after which it is within 1e-3 of the least
_SETTLED_ALONE = 1e-3  # where there is no room for all blocks, and each pass gains less
_ROUNDING = 1e-15  # of ‖X‖²
_KERNEL_WIDTH = 16  # products with as many columns, or twice, take no longer than with a few fewer
_MOST_BLOCKS = 4  # that the search space holds, beside the next one
_SPACE_BYTES = 8 << 20  # that it takes at most, or a quarter of a matrix of 16 bits if that is more
_FLOOR_OF_SINGLE = 1e-5  # of the largest eigenvalue of XᵀX; float32 shows none that is much smaller
_HELD_BY_SINGLE = 1e-20, 1e20  # ‖X‖²_F, between which float32 holds X and XᵀX


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
    basis = _Search(source, min(padded_width(width), *source.shape), seed).basis(power_iterations)
    product = np.empty((rows, basis.shape[1]))
    for _ in over_rows(lambda i, j, rows: np.matmul(rows, basis, out=product[i:j]), source):
        pass
    u, s, inner = np.linalg.svd(product, full_matrices=False)
    return StreamedSvd(u[:, :width], s[:width], inner[:width] @ basis.T, source.squared_norm)


def padded_width(width: int) -> int:
    """Return the width of blocks of vectors: up to the next that costs no more."""
    return -(-width // _KERNEL_WIDTH) * _KERNEL_WIDTH


class _Search:
    """Looks for the space of the leading right singular vectors of X.

    It holds orthonormal vectors V and their images XᵀX·V. The best vectors inside V are those of
    VᵀXᵀXV, and their images, which are known, are one power iteration ahead of them.

    Args:
        source: the matrix X.
        width: vectors in a block.
        seed: of the random start.
    """

    def __init__(self, source: RowBlocks, width: int, seed: int) -> None:
        self._source = source
        self._width = width
        low, high = _HELD_BY_SINGLE
        self._single = low < source.squared_norm < high
        rows, columns = source.shape
        rng = np.random.default_rng(seed)
        start = np.empty((columns, width), np.float32 if self._single else np.float64)
        for first, last in row_spans(start.shape):
            start[first:last] = rng.standard_normal((last - first, width))
        self._next: Array = np.linalg.qr(start)[0]
        del start
        most = max(_SPACE_BYTES, rows * columns // 2)
        self._blocks = max(1, min(_MOST_BLOCKS, most // (8 * width * columns)))
        self._begin()

    def _begin(self) -> None:
        """Forget all vectors; memory is taken once, since new arrays beside old ones double it."""
        wide = np.float32 if self._single else np.float64
        blocks = self._blocks if self._blocks > 1 else 0
        shape = (self._source.shape[1], blocks * self._width)
        self._held, self._held_images = (np.empty(shape, wide, order="F") for _ in range(2))
        self._count = 0

    def _hold(self, vectors: Array, images: Array) -> None:
        if self._blocks == 1:
            self._held, self._held_images, self._count = vectors, images, vectors.shape[1]
            return
        end = self._count + vectors.shape[1]
        self._held[:, self._count : end] = vectors
        self._held_images[:, self._count : end] = images
        self._count = end

    @property
    def _space(self) -> Array:
        return self._held[:, : self._count]

    @property
    def _images(self) -> Array:
        return self._held_images[:, : self._count]

    def basis(self, power_iterations: int | None) -> Array:
        """Return orthonormal columns: (n, width) float64.

        Args:
            power_iterations: passes over X; None for as many as lessen the error by more than a
                thousandth.
        """
        best, captured, total = self._next, 0.0, self._source.squared_norm
        has_room = 1 < self._blocks < self._source.shape[1] // self._width
        settled = _SETTLED if has_room else _SETTLED_ALONE
        for _ in range(_MOST_PASSES if power_iterations is None else power_iterations):
            before = captured
            best, captured = self._pass()
            least = max(settled * (total - captured), _ROUNDING * total)
            if power_iterations is None and captured - before < least:
                break
        del self._held, self._held_images, self._next
        return _orthonormal(best)

    def _pass(self) -> tuple[Array, float]:
        """Return the image of the best vectors, and their energy, after one more pass.

        The float32 of a product hides small singular values behind large ones. Where those looked
        for are so small, the search begins anew in float64.
        """
        image = self._times(self._next)
        wide = image.dtype
        self._hold(self._next, image)
        projected = (self._space.T @ self._images).astype(np.float64)
        values, vectors = np.linalg.eigh((projected + projected.T) / 2.0)
        values, vectors = values[::-1], vectors[:, ::-1]
        chosen = vectors[:, : self._width].astype(wide)
        best: Array = self._images @ chosen
        captured = float(values[: self._width].sum())
        least = values[min(self._width, len(values)) - 1]
        if self._single and least < _FLOOR_OF_SINGLE * values[0]:
            self._single, self._next = False, _orthonormal(best)
            self._begin()
            return self._pass()
        if self._blocks == 1 or self._count + self._width > len(best):  # no room beside it
            self._count = 0
            self._next = np.linalg.qr(best)[0]
            return best, captured
        if self._count + self._width > self._held.shape[1]:
            vectors = self._space @ chosen
            self._count = 0
            self._hold(vectors, best)
        rest = best
        for _ in range(2):  # what rounding leaves of the space in it is gone after the second time
            rest = rest - self._space @ (self._space.T @ rest)
            rest = np.linalg.qr(rest)[0]
        self._next = rest
        return best, captured

    def _times(self, basis: Array) -> Array:
        """Return XᵀX @ basis: (n, width) in float32 or float64, blocks summed in float64."""
        wide = np.float32 if self._single else np.float64
        narrow = np.ascontiguousarray(basis, dtype=wide)
        total = np.zeros(basis.shape)

        def image(_: int, __: int, rows: Array) -> Array:
            result: Array = rows.T @ (rows @ narrow)
            return result

        for part in over_rows(image, self._source, single=self._single):
            total += part
        return total.astype(wide)


def _orthonormal(columns: Array) -> Array:
    """Return an orthonormal basis in float64; of float32 columns with half the memory of QR."""
    q: Array = np.linalg.qr(columns)[0]
    if q.dtype == np.float64:
        return q
    q = q.astype(np.float64)
    lower = np.linalg.cholesky(q.T @ q)  # all but the identity, so nothing is lost
    return q @ np.linalg.inv(lower).T


def _exact(source: RowBlocks) -> StreamedSvd:
    """Reduce the long side by QR of blocks, then decompose the small matrix."""
    rows, columns = source.shape
    if rows <= columns:
        whole = np.concatenate([*over_rows(lambda _, __, rows: rows.copy(), source)])
        q, r = np.linalg.qr(whole.T)
        u, s, vt = np.linalg.svd(r.T, full_matrices=False)
        return StreamedSvd(u, s, vt @ q.T, source.squared_norm)
    gathered = np.empty((0, columns))
    for block in over_rows(lambda _, __, rows: rows.copy(), source):
        gathered = np.asarray(np.linalg.qr(np.concatenate([gathered, block]), mode="r"))
    _, s, vt = np.linalg.svd(gathered, full_matrices=False)
    inverse = np.where(s > 1e-12 * max(s[0], 1e-300), 1.0 / np.maximum(s, 1e-300), 0.0)
    to_u = vt.T * inverse
    u = np.concatenate([*over_rows(lambda _, __, rows: rows @ to_u, source)])
    return StreamedSvd(u, s, vt, source.squared_norm)


class StreamedMatrix:
    """A streamed matrix with the same questions as `Matrix`.

    Args:
        source: its rows.
        svd: decomposes it, when the first question needs that.
    """

    def __init__(self, source: RowBlocks, svd: Callable[[], StreamedSvd]) -> None:
        self._source = source
        self._decompose = svd

    @once
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
        for start, stop in row_spans(self._source.shape):
            yield start, stop, self._source.rows(start, stop)
