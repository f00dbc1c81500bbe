"""Matrices that are read a block of rows at a time, as often as needed.

The rows come from an anonymous file, where making them is dear, or are made anew at each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from loratools.work.parallel import in_parts
from loratools.work.scratch import AnonymousFile
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError

_BLOCK_ELEMENTS = 1 << 19

Result = TypeVar("Result")


class RowBlocks(Protocol):
    """A matrix that is read a block of rows at a time, as often as needed."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    @property
    def squared_norm(self) -> float:
        """‖X‖²_F."""

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in float64."""

    def single_rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in float32."""


def over_rows(
    function: Callable[[int, int, Array], Result], source: RowBlocks, *, single: bool = False
) -> Iterator[Result]:
    """Yield function(start, stop, rows) for each block of rows, in order.

    It runs in several threads where some are idle, and what it returns must not be the rows, whose
    memory may be used again.

    Args:
        function: what to do.
        source: where the rows come from.
        single: read them in float32.
    """
    read = source.single_rows if single else source.rows
    return in_parts(lambda span: function(*span, read(*span)), [*row_spans(source.shape)])


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
        self._height = 0

    def append(self, rows: Array, squared_norm: float) -> None:
        """Add rows below those already there.

        Args:
            rows: (height, n) float32, contiguous.
            squared_norm: ‖rows‖²_F.
        """
        self._file.write_at(4 * self.shape[1] * self._height, rows.view(np.uint8).reshape(-1).data)
        self.squared_norm += squared_norm
        self._height += len(rows)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in float64."""
        return self.single_rows(start, stop).astype(np.float64)

    def single_rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in float32, not to be changed."""
        width = 4 * self.shape[1]
        data = self._file.read_at(start * width, (stop - start) * width)
        return np.frombuffer(data, np.float32).reshape(stop - start, -1)


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
        self.rows = rows
        with np.errstate(over="ignore", invalid="ignore"):
            self.squared_norm = sum(over_rows(lambda *block: _squared(block[2]), self), 0.0)
        if not math.isfinite(self.squared_norm):
            raise AdapterError("the weight change overflows", hint="Is its scale right?")

    def single_rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in float32."""
        return self.rows(start, stop).astype(np.float32)


def _squared(values: Array) -> float:
    return float(np.vdot(values, values))


def row_spans(shape: tuple[int, int], most: int = 1 << 19) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of blocks of rows, small enough to hold several of.

    Args:
        shape: (m, n).
        most: elements in a block of more than one row.
    """
    rows, columns = shape
    height = max(1, min(most, _BLOCK_ELEMENTS) // columns)
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


def squared_residual(source: RowBlocks, b: Array, a: Array) -> float:
    """Return ‖X − b @ a‖²_F, summed block by block."""

    def squared(start: int, stop: int, rows: Array) -> float:
        return float(np.sum((rows - b[start:stop] @ a) ** 2))

    return sum(over_rows(squared, source), 0.0)
