"""A weight change of any form, taken apart: spectra, factors and errors from its declaration."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.decompose import Decomposed, Matrix, RandomisedSvd, padded
from loratools.device import Device
from loratools.kinds.declaration import Change, Kronecker, Product, Rows
from loratools.stream import RowSource, StreamedMatrix, streamed_svd

Array = np.ndarray[Any, Any]

_NEGLIGIBLE = 1e-14


@dataclass(frozen=True)
class Streaming:
    """How to look for the leading triplets of a change of full rank.

    Attributes:
        width: how many to look for, oversampling included.
        seed: of the random start.
    """

    width: int
    seed: int


def rows_of(change: Change) -> Rows:
    """Return a change of any form as rows on demand."""
    if isinstance(change, Rows):
        return change
    if isinstance(change, Product):
        b, a = change.b, change.a
        return Rows((len(b), a.shape[1]), lambda start, stop: b[start:stop] @ a)
    left, right, scale = change.left, change.right, change.scale
    height = len(right)

    def rows(start: int, stop: int) -> Array:
        first, last = start // height, (stop - 1) // height + 1
        whole = np.kron(left[first:last], right)
        result: Array = scale * whole[start - first * height : stop - first * height]
        return result

    return Rows((len(left) * height, left.shape[1] * right.shape[1]), rows)


class KroneckerMatrix:
    """A Kronecker product, whose singular values are the products of those of its sides.

    Args:
        change: the product.
    """

    def __init__(self, change: Kronecker) -> None:
        self._left = np.linalg.svd(change.left, full_matrices=False)
        self._right = np.linalg.svd(change.right, full_matrices=False)
        self._scale = change.scale
        self._rows = rows_of(change)
        products = np.multiply.outer(self._left[1], self._right[1])
        self._order = np.argsort(-products, axis=None, kind="stable")
        self._values = abs(change.scale) * products.reshape(-1)[self._order]

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
        signs = np.where(-b.min(axis=0) > b.max(axis=0), -1.0, 1.0)
        b, a = b * root * signs, a * (np.copysign(root, self._scale) * signs)[:, None]
        return padded(b, a, rank)

    def squared_error(self, b: Array, a: Array) -> float:
        """Return ‖ΔW − b @ a‖²_F."""
        source = RowSource(
            self._rows.shape, lambda start, stop: self._rows.rows(start, stop) - b[start:stop] @ a
        )
        return source.squared_norm


def decomposed(change: Change, device: Device, streaming: Streaming, label: str) -> Decomposed:
    """Return a change taken apart.

    Args:
        change: ΔW.
        device: where to compute with factors.
        streaming: how to compute with rows.
        label: from which the random start derives, beside the seed.
    """
    if isinstance(change, Product):
        return Matrix(change.b, change.a, 1.0, device, use_gram=True)
    if isinstance(change, Kronecker):
        return KroneckerMatrix(change)
    source = RowSource(change.shape, change.rows)
    seed = zlib.crc32(label.encode(), streaming.seed & 0xFFFFFFFF)
    svd = streamed_svd(source, streaming.width, power_iterations=None, seed=seed)
    return StreamedMatrix(source, svd)


def exact_factors(change: Change, *, of_any_rank: bool) -> Product | None:
    """Return factors that lose nothing but rounding, without ranks that are zero; None if none.

    Args:
        change: ΔW; at least one rank is kept.
        of_any_rank: decompose rows too, at whatever rank they have.
    """
    if isinstance(change, Rows) and not of_any_rank:
        return None
    if not isinstance(change, Product):
        matrix: Decomposed
        if isinstance(change, Kronecker):
            matrix = KroneckerMatrix(change)
        else:
            source = RowSource(change.shape, change.rows)
            svd = streamed_svd(source, min(change.shape), power_iterations=0, seed=0)
            matrix = StreamedMatrix(source, svd)
        values = matrix.singular_values
        rank = int(np.count_nonzero(values > _NEGLIGIBLE * values[0]))
        return Product(*matrix.factors(max(rank, 1)))
    alive = np.flatnonzero(change.b.any(axis=0) & change.a.any(axis=1))
    if not alive.size:
        alive = np.zeros(1, np.int64)
    return Product(change.b[:, alive], change.a[alive])
