"""Entries of several deltas of one module, a block of rows at a time, and exact selection on them.

A task is one adapter's ΔW for the module. Nothing here holds more than a block of rows; what needs
a look at all entries (the k-th largest magnitude, a sum) streams over the blocks. Entries are
float32, computed in float64 and rounded once; blocks have the same rows in every pass, so the
same entries come out each time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loratools.algebra.streamed_svd import row_spans
from loratools.work.seeds import seed_of_64_bits
from loratools_formats.core.dtypes import Array

Score = Callable[[int, int], Array]
RowReader = Callable[[int, int], Array]
"""Returns rows [start, stop) of a merged ΔW."""

_HIGH_BITS = 15


class TaskRows(Protocol):
    """Rows of one task's ΔW."""

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32 (stop − start, n)."""


@dataclass(frozen=True)
class FactorRows:
    """Rows of scale · b @ a.

    Attributes:
        b: (m, r) float64, the scale folded in.
        a: (r, n) float64.
    """

    b: Array
    a: Array

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop)."""
        return (self.b[start:stop] @ self.a).astype(np.float32)


@dataclass(frozen=True)
class ZeroRows:
    """Rows of a task that does not have the module."""

    columns: int

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop)."""
        return np.zeros((stop - start, self.columns), np.float32)


@dataclass(frozen=True)
class DenseRows:
    """Rows of a matrix held in memory, such as a core."""

    matrix: Array

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop)."""
        return self.matrix[start:stop].astype(np.float32)


@dataclass(frozen=True)
class Tasks:
    """The deltas of one module from all adapters.

    Attributes:
        sources: one per adapter.
        shape: (m, n) of the matrix.
        seed: of random methods.
        name: the module, from which random streams derive.
        share_threshold: for methods that trim over all modules at once: returns the threshold of a
            task at a density; None to trim per module.
    """

    sources: Sequence[TaskRows]
    shape: tuple[int, int]
    seed: int
    name: str
    share_threshold: Callable[[int, float], float] | None = None

    @property
    def count(self) -> int:
        """Number of tasks T."""
        return len(self.sources)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Return (start, stop) of each block of rows."""
        return row_spans(self.shape)

    def block(self, start: int, stop: int) -> Array:
        """Return all tasks' rows [start, stop): (T, stop − start, n) float32."""
        return np.stack([source.rows(start, stop) for source in self.sources])

    def magnitudes(self, task: int) -> Score:
        """Return the score |ΔW| of one task."""
        return lambda start, stop: np.abs(self.sources[task].rows(start, stop))

    def total(self, score: Score) -> float:
        """Return the sum of a score over all entries, in float64."""
        return float(sum(score(*span).sum(dtype=np.float64) for span in self.spans()))

    def nonzero(self, score: Score) -> int:
        """Return how many entries of a score are not zero."""
        return sum(int(np.count_nonzero(score(*span))) for span in self.spans())

    def kth_largest(self, score: Score, k: int) -> float:
        """Return the k-th largest value of a non-negative float32 score, exactly.

        The bits of non-negative floats are ordered as the floats are: a histogram of the high bits
        finds the bin of the k-th largest, one of the low bits inside it finds the value.

        Args:
            score: function of (start, stop) giving those rows of the score.
            k: from 1; infinity is returned for 0.
        """
        if k <= 0:
            return float("inf")
        counts = Histogram()
        for span in self.spans():
            counts.add_high(score(*span))
        counts.choose(k)
        for span in self.spans():
            counts.add_low(score(*span))
        return counts.value()

    def random_rows(self, task: int, start: int, stop: int) -> Array:
        """Return uniform numbers in [0, 1) for rows of a task: the same whatever the blocks."""
        key = [seed_of_64_bits(self.seed), zlib.crc32(self.name.encode())]
        streams = (
            np.random.Generator(np.random.Philox(key=key, counter=[0, 0, row, task]))
            for row in range(start, stop)
        )
        return np.stack([stream.random(self.shape[1], dtype=np.float32) for stream in streams])


class Histogram:
    """Exact selection of the k-th largest non-negative float32 in two passes over any blocks."""

    def __init__(self) -> None:
        self._high = np.zeros(1 << (32 - _HIGH_BITS), np.int64)
        self._low = np.zeros(1 << _HIGH_BITS, np.int64)
        self._bin = -1
        self._rank = 0

    @staticmethod
    def _bits(values: Array) -> Array:
        return np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)

    def add_high(self, values: Array) -> None:
        """Count values of the first pass."""
        self._high += np.bincount(self._bits(values) >> _HIGH_BITS, minlength=len(self._high))

    def choose(self, k: int) -> None:
        """Fix which value is looked for, after the first pass."""
        above = np.cumsum(self._high[::-1])
        place = int(np.searchsorted(above, min(k, int(above[-1]))))
        self._bin = len(self._high) - 1 - place
        self._rank = min(k, int(above[-1])) - (int(above[place - 1]) if place else 0)

    def add_low(self, values: Array) -> None:
        """Count values of the second pass."""
        bits = self._bits(values)
        inside = bits[(bits >> _HIGH_BITS) == self._bin] & ((1 << _HIGH_BITS) - 1)
        self._low += np.bincount(inside, minlength=len(self._low))

    def value(self) -> float:
        """Return the value, after the second pass."""
        above = np.cumsum(self._low[::-1])
        place = len(self._low) - 1 - int(np.searchsorted(above, self._rank))
        bits = np.uint32((self._bin << _HIGH_BITS) | place)
        return float(np.array([bits], np.uint32).view(np.float32)[0])
