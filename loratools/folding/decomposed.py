"""ΔW of any form, taken apart: spectra, factors and errors from its declaration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Decomposed, Matrix, RandomisedSvd, padded, signed
from loratools.algebra.row_blocks import RowSource, row_spans
from loratools.algebra.streamed_svd import StreamedMatrix, streamed_svd
from loratools.kinds.declaration import Columns, DeltaForm, Kronecker, Product, Rows, rows_in_groups
from loratools.work.seeds import seed_of_matrix
from loratools_formats.core.dtypes import Array

_NEGLIGIBLE = 1e-14


@dataclass(frozen=True)
class Streaming:
    """How to look for the leading triplets of a ΔW of full rank.

    Attributes:
        width: how many to look for, oversampling included.
        seed: of the random start.
    """

    width: int
    seed: int


def rows_of(form: DeltaForm) -> Rows:
    """Return ΔW of any form as rows on demand."""
    if isinstance(form, Rows):
        return form
    if isinstance(form, Product):
        b, a = form.b, form.a
        return Rows((len(b), a.shape[1]), lambda start, stop: b[start:stop] @ a)
    if isinstance(form, Columns):
        columns, spans = form.columns, [*row_spans(form.shape[::-1])]
        return Rows(
            form.shape,
            lambda start, stop: np.concatenate(
                [columns(*span)[:, start:stop].T for span in spans], 1
            ),
        )
    left, right, scale = form.left, form.right, form.scale
    height = len(right)

    def of_blocks(first: int, last: int) -> Array:
        return scale * np.kron(left[first:last], right)

    shape = (len(left) * height, left.shape[1] * right.shape[1])
    return Rows(shape, rows_in_groups(height, of_blocks))


class KroneckerMatrix:
    """A Kronecker product, whose singular values are the products of those of its sides.

    Args:
        form: the product.
    """

    def __init__(self, form: Kronecker) -> None:
        self._left = np.linalg.svd(form.left, full_matrices=False)
        self._right = np.linalg.svd(form.right, full_matrices=False)
        self._scale = form.scale
        self._rows = rows_of(form)
        products = np.multiply.outer(self._left[1], self._right[1])
        self._order = np.argsort(-products, axis=None, kind="stable")
        self._values = abs(form.scale) * products.reshape(-1)[self._order]

    def dense(self) -> Array:
        """Return the product: (out, in) float64."""
        return self._rows.rows(0, self._rows.shape[0])

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F."""
        return float(np.sum(self._values**2))

    @property
    def singular_values(self) -> Array:
        """Every one, descending."""
        values: Array = self._values
        return values

    def factors(self, rank: int, randomised: RandomisedSvd | None = None) -> tuple[Array, Array]:
        """Return the best (b, a) of a rank, balanced, of scale 1; there is no need for chance."""
        del randomised
        chosen = self._order[:rank]
        i, j = np.unravel_index(chosen, (len(self._left[1]), len(self._right[1])))
        root = np.sqrt(self._values[:rank])
        u1, _, v1 = self._left
        u2, _, v2 = self._right
        b = (u1[:, None, i] * u2[None, :, j]).reshape(-1, len(chosen))
        a = (v1[i][:, :, None] * v2[j][:, None, :]).reshape(len(chosen), -1)
        b, a = signed(b * root, a * np.copysign(root, self._scale)[:, None])
        return padded(b, a, rank)

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖ΔW − b @ a‖²_F."""
        source = RowSource(
            self._rows.shape, lambda start, stop: self._rows.rows(start, stop) - b[start:stop] @ a
        )
        return source.squared_norm


class TransposedMatrix:
    """The transpose of a matrix that has been taken apart.

    Args:
        inner: the matrix.

    Attributes:
        inner: the matrix.
    """

    def __init__(self, inner: Decomposed) -> None:
        self.inner = inner

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F."""
        return self.inner.squared_norm

    @property
    def singular_values(self) -> Array:
        """Those that are known, descending."""
        return self.inner.singular_values

    def factors(self, rank: int, randomised: RandomisedSvd | None = None) -> tuple[Array, Array]:
        """Return the best (b, a) of a rank, balanced, of scale 1."""
        b, a = self.inner.factors(rank, randomised)
        return signed(a.T, b.T)

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖ΔW − b @ a‖²_F."""
        return self.inner.squared_error(a.T, b.T)


def decomposed(form: DeltaForm, device: Device, streaming: Streaming, label: str) -> Decomposed:
    """Return ΔW taken apart.

    Args:
        form: ΔW.
        device: where to compute with factors.
        streaming: how to compute with rows.
        label: from which the random start derives, beside the seed.
    """
    if isinstance(form, Product):
        return Matrix(form.b, form.a, 1.0, device, use_gram=True)
    if isinstance(form, Kronecker):
        return KroneckerMatrix(form)
    seed = seed_of_matrix(streaming.seed, label)
    if isinstance(form, Columns):
        transposed = RowSource(form.shape[::-1], form.columns)
        return TransposedMatrix(_streamed(transposed, streaming.width, seed))
    return _streamed(RowSource(form.shape, form.rows), streaming.width, seed)


def _streamed(source: RowSource, width: int, seed: int) -> StreamedMatrix:
    return StreamedMatrix(
        source, lambda: streamed_svd(source, width, power_iterations=None, seed=seed)
    )


def exact_factors(form: DeltaForm, *, of_any_rank: bool) -> Product | None:
    """Return factors that lose nothing but rounding, without ranks that are zero; None if none.

    Args:
        form: ΔW; at least one rank is kept.
        of_any_rank: decompose rows too, at whatever rank they have.
    """
    if isinstance(form, Rows | Columns) and not of_any_rank:
        return None
    if not isinstance(form, Product):
        matrix: Decomposed
        if isinstance(form, Kronecker):
            matrix = KroneckerMatrix(form)
        else:
            rows = rows_of(form)
            source = RowSource(rows.shape, rows.rows)
            svd = streamed_svd(source, min(rows.shape), power_iterations=0, seed=0)
            matrix = StreamedMatrix(source, lambda: svd)
        values = matrix.singular_values
        rank = int(np.count_nonzero(values > _NEGLIGIBLE * values[0]))
        return Product(*matrix.factors(max(rank, 1)))
    alive = np.flatnonzero(form.b.any(axis=0) & form.a.any(axis=1))
    if not alive.size:
        alive = np.zeros(1, np.int64)
    return Product(form.b[:, alive], form.a[alive])


def dense(part: Decomposed) -> Array:
    """Return ΔW of a matrix that was made here, in whole: (out, in) float64."""
    if isinstance(part, TransposedMatrix):
        return dense(part.inner).T
    if isinstance(part, KroneckerMatrix | Matrix):
        return part.dense()
    assert isinstance(part, StreamedMatrix)
    return np.concatenate([block.copy() for _, _, block in part.blocks()])
