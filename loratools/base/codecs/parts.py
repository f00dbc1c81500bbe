"""The stored tensors of a quantised weight: reading rows or columns of them."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np

from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef

_HELD = 16 << 20  # bytes of one matrix that are read whole where columns are asked for


class Columns:
    """Columns of stored matrices, read without the others where a matrix is large.

    A matrix of a few megabytes is read whole and kept by each thread until it reads another one,
    since its columns lie apart.

    Args:
        tensor: the matrices, one behind the other.
        height: rows of each.
        width: bytes of a row.
    """

    _kept = threading.local()

    def __init__(self, tensor: TensorRef, height: int, width: int) -> None:
        self._tensor = tensor
        self._height = height
        self._width = width

    def read(self, start: int, stop: int, matrix: int = 0) -> Array:
        """Return bytes [start, stop) of every row of a matrix: (height, stop - start) U8."""
        size = self._height * self._width
        begin = matrix * size
        if size <= _HELD:
            kept = getattr(self._kept, "whole", None)
            if kept is None or kept[0] is not self or kept[1] != matrix:
                data = self._tensor.raw_range(begin, begin + size)
                whole = np.frombuffer(data, np.uint8).reshape(self._height, self._width)
                kept = self._kept.whole = (self, matrix, whole)
            return kept[2][:, start:stop]
        out = np.empty((self._height, stop - start), np.uint8)
        for row in range(self._height):
            at = begin + row * self._width
            out[row] = np.frombuffer(self._tensor.raw_range(at + start, at + stop), np.uint8)
        return out


class _Elements(Protocol):
    """Values that are read by their place among all."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def elements(self, start: int, stop: int, /) -> Array: ...


def matrix_rows(tensor: _Elements, start: int, stop: int) -> Array:
    """Return rows [start, stop), along the last dimension, in the type of the elements."""
    width = tensor.shape[-1]
    return tensor.elements(start * width, stop * width).reshape(stop - start, width)
