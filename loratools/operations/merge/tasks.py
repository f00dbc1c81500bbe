"""Entries of several deltas of one module, a block of rows at a time, and exact selection on them.

A task is one adapter's ΔW for the module. Nothing here holds more than a block of rows; what needs
a look at all entries (the k-th largest magnitude, a sum) streams over the blocks. Entries are
float32, computed in float64 and rounded once; blocks have the same rows in every pass, so the
same entries come out each time. Blocks are small enough to stay in a core's cache while a method
goes over them again and again.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.operations.merge.selection import SAMPLE, Blocks, largest
from loratools.work.buffers import Buffers
from loratools.work.parallel import in_parts
from loratools.work.seeds import seed_of_64_bits
from loratools_formats.core.dtypes import Array

Score = Callable[[int, int], Array]
Result = TypeVar("Result")
RowReader = Callable[[int, int], Array]
"""Returns rows [start, stop) of a merged ΔW."""

_BLOCK_ELEMENTS = 1 << 16
_LEAST_SAMPLED = 4 * SAMPLE  # entries; of fewer, two passes cost next to nothing
_SAMPLED_AT_ONCE = 1 << 12
_SPANS_AT_ONCE = 8
_BUFFERS = Buffers()


class TaskRows(Protocol):
    """Rows of one task's ΔW."""

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) as float32 (stop − start, n), which the caller may change."""


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
        shape = (stop - start, self.a.shape[1])
        product = _BUFFERS.array("product", shape, np.float64)
        return np.matmul(self.b[start:stop], self.a, out=product).astype(np.float32)

    def sample(self, count: int) -> Array:
        """Return the magnitudes of entries at random places, the same each time: (count,)."""
        rng = np.random.default_rng(0)
        columns = np.ascontiguousarray(self.a.T)
        found = np.empty(count, np.float32)
        for start in range(0, count, _SAMPLED_AT_ONCE):
            size = min(_SAMPLED_AT_ONCE, count - start)
            left = self.b[rng.integers(len(self.b), size=size)]
            right = columns[rng.integers(len(columns), size=size)]
            found[start : start + size] = np.abs(np.einsum("ij,ij->i", left, right))
        return found


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
        return row_spans(self.shape, _BLOCK_ELEMENTS)

    def block(self, start: int, stop: int) -> Array:
        """Return all tasks' rows [start, stop): (T, stop − start, n) float32."""
        found = np.empty((self.count, stop - start, self.shape[1]), np.float32)
        for task, source in enumerate(self.sources):
            found[task] = source.rows(start, stop)
        return found

    def magnitudes(self, task: int) -> Score:
        """Return the score |ΔW| of one task."""

        def score(start: int, stop: int) -> Array:
            rows = self.sources[task].rows(start, stop)
            return np.abs(rows, out=rows)

        return score

    def largest_magnitudes(self, task: int, ranks: Sequence[int]) -> list[float]:
        """Return the k-th largest |ΔW| of one task for each k, exactly; infinity for 0."""
        source, elements = self.sources[task], self.shape[0] * self.shape[1]
        sample = None
        if isinstance(source, FactorRows) and elements >= _LEAST_SAMPLED:
            sample = source.sample(SAMPLE)
        return self._largest(self.magnitudes(task), ranks, sample)

    def each(self, function: Callable[[int, int], Result]) -> Iterator[Result]:
        """Yield function(start, stop) for each block of rows, in order; idle threads take some."""
        return in_parts(lambda span: function(*span), [*self.spans()], at_once=_SPANS_AT_ONCE)

    def total(self, score: Score) -> float:
        """Return the sum of a score over all entries, in float64."""
        return float(sum(self.each(lambda i, j: score(i, j).sum(dtype=np.float64))))

    def nonzero(self, score: Score) -> int:
        """Return how many entries of a score are not zero."""
        return sum(self.each(lambda i, j: int(np.count_nonzero(score(i, j)))))

    def kth_largest(self, score: Score, k: int) -> float:
        """Return the k-th largest value of a non-negative float32 score, exactly.

        Args:
            score: function of (start, stop) giving those rows of the score.
            k: from 1; infinity is returned for 0.
        """
        return self._largest(score, [k], None)[0]

    def _largest(self, score: Score, ranks: Sequence[int], sample: Array | None) -> list[float]:
        elements = self.shape[0] * self.shape[1]
        return largest(self.blocks(score), ranks, sample, elements)

    def blocks(self, score: Score) -> Blocks:
        """Return what gives the blocks of a score to a function, and yields what that returns."""
        return lambda look: self.each(lambda start, stop: look(score(start, stop)))

    def random_rows(self, task: int, start: int, stop: int) -> Array:
        """Return uniform numbers in [0, 1) for rows of a task: the same whatever the blocks.

        Every row has a stream of its own, the counter of Philox with the row's number in it.
        """
        key = [seed_of_64_bits(self.seed), zlib.crc32(self.name.encode())]
        bits = np.random.Philox(key=key)
        stream, state = np.random.Generator(bits), bits.state  # of a stream that has not begun
        found = np.empty((stop - start, self.shape[1]), np.float32)
        for row, numbers in zip(range(start, stop), found, strict=True):
            state["state"]["counter"] = np.array([0, 0, row, task], np.uint64)
            bits.state = state  # a third of what it takes to make another
            stream.random(dtype=np.float32, out=numbers)
        return found
