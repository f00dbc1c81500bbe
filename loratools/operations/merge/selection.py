"""Exact selection: the k-th largest of more numbers than memory holds.

The bits of non-negative floats are ordered as the floats are. `Histogram` finds any number in two
passes, a bin of the high bits first. `Bracket` needs one: a sample tells between which two numbers
the wanted one lies, almost surely; what lies above is counted, what lies between is kept. If it is
not between them after all, that shows, and the histogram finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from loratools_formats.core.dtypes import Array

Blocks = Callable[[Callable[[Array], Any]], Iterator[Any]]

_HIGH_BITS = 15
SAMPLE = 1 << 16
_DEVIATIONS = 5.0
_MOST_BINS = 1 << 20
_MOST_KEPT = 1 << 19


def bits_of(values: Array) -> Array:
    """Return the bits of non-negative float32 numbers as uint32 in one dimension."""
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)


def _float_of(bits: int) -> float:
    return float(np.array([bits], np.uint32).view(np.float32)[0])


def largest(
    blocks: Blocks,
    ranks: Sequence[int],
    sample: Array | None,
    elements: int,
) -> list[float]:
    """Return the k-th largest of non-negative float32 numbers for several k, exactly.

    Args:
        blocks: given a function, yields what it returns of each block of the numbers.
        ranks: each k from 1; infinity is returned for 0.
        sample: numbers drawn at random from them; None if there is none.
        elements: how many numbers there are.
    """
    found: list[float | None] = [math.inf if k <= 0 else None for k in ranks]
    if sample is not None:
        places = [place for place, value in enumerate(found) if value is None]
        brackets = [Bracket(sample, ranks[place], elements) for place in places]
        for found_in in blocks(lambda values: _looked_at(brackets, values)):
            for bracket, (above, inside) in zip(brackets, found_in, strict=True):
                bracket.add(above, inside)
        for place, bracket in zip(places, brackets, strict=True):
            found[place] = bracket.value()
    return [
        _by_histogram(blocks, k) if value is None else value
        for k, value in zip(ranks, found, strict=True)
    ]


def _looked_at(brackets: Sequence[Bracket], values: Array) -> list[tuple[int, Array]]:
    bits = bits_of(values)
    return [bracket.look(bits) for bracket in brackets]


def _by_histogram(blocks: Blocks, k: int) -> float:
    counts = Histogram()
    for values in blocks(np.copy):
        counts.add_high(values)
    counts.choose(k)
    for values in blocks(np.copy):
        counts.add_low(values)
    return counts.value()


class Bracket:
    """Looks for the k-th largest number between two that a sample gives.

    Args:
        sample: non-negative float32 numbers drawn at random.
        k: from 1.
        elements: how many numbers there are.
    """

    def __init__(self, sample: Array, k: int, elements: int) -> None:
        self._k = min(k, elements)
        ordered = np.sort(bits_of(sample))[::-1]
        share = self._k / elements
        middle = share * len(ordered)
        margin = _DEVIATIONS * math.sqrt(middle * (1.0 - share)) + 2.0
        first, last = math.floor(middle - margin), math.ceil(middle + margin)
        self._high = int(ordered[first]) if first >= 0 else (1 << 32) - 1
        self._low = int(ordered[last]) if last < len(ordered) else 0
        self._above = 0
        self._kept: list[Array] = []
        self._held = 0
        self._bins: Array | None = None
        self._is_lost = False

    def look(self, bits: Array) -> tuple[int, Array]:
        """Return how many numbers are above it, and the bits of those inside.

        Args:
            bits: of the numbers: uint32, in one dimension.
        """
        if self._is_lost:
            return 0, bits[:0]
        reach = bits >= self._low
        above = bits > self._high
        count = int(np.count_nonzero(above))
        return count, bits[np.logical_xor(reach, above, out=above)]

    def add(self, above: int, inside: Array) -> None:
        """Count numbers that were looked at."""
        self._above += above
        if inside.size:
            self._kept.append(inside)
            self._held += inside.size
        if self._held > _MOST_KEPT:
            self._count()

    def _count(self) -> None:
        """Turn the numbers that are kept into counts of each."""
        width = self._high - self._low + 1
        if width > _MOST_BINS:
            self._is_lost, self._kept, self._held = True, [], 0
            return
        if self._bins is None:
            self._bins = np.zeros(width, np.int64)
        for inside in self._kept:
            if inside.size < width >> 4:
                np.add.at(self._bins, inside - np.uint32(self._low), 1)
            else:
                self._bins += np.bincount(inside - np.uint32(self._low), minlength=width)
        self._kept, self._held = [], 0

    def value(self) -> float | None:
        """Return the number; None if it is not in the bracket, or too many are."""
        rank = self._k - self._above
        if self._is_lost or rank < 1:
            return None
        if self._bins is not None:
            self._count()
        if self._bins is None:
            inside = np.concatenate([*self._kept, np.empty(0, np.uint32)])
            if rank > inside.size:
                return None
            return _float_of(np.partition(inside, inside.size - rank)[inside.size - rank])
        from_above = np.cumsum(self._bins[::-1])
        if rank > from_above[-1]:
            return None
        return _float_of(self._high - int(np.searchsorted(from_above, rank)))


class Histogram:
    """Exact selection of the k-th largest non-negative float32 in two passes over any blocks."""

    def __init__(self) -> None:
        self._high = np.zeros(1 << (32 - _HIGH_BITS), np.int64)
        self._low = np.zeros(1 << _HIGH_BITS, np.int64)
        self._bin = -1
        self._rank = 0

    def add_high(self, values: Array) -> None:
        """Count values of the first pass."""
        self._high += np.bincount(bits_of(values) >> _HIGH_BITS, minlength=len(self._high))

    def choose(self, k: int) -> None:
        """Fix which value is looked for, after the first pass."""
        above = np.cumsum(self._high[::-1])
        place = int(np.searchsorted(above, min(k, int(above[-1]))))
        self._bin = len(self._high) - 1 - place
        self._rank = min(k, int(above[-1])) - (int(above[place - 1]) if place else 0)

    def add_low(self, values: Array) -> None:
        """Count values of the second pass."""
        bits = bits_of(values)
        inside = bits[(bits >> _HIGH_BITS) == self._bin] & ((1 << _HIGH_BITS) - 1)
        self._low += np.bincount(inside, minlength=len(self._low))

    def value(self) -> float:
        """Return the value, after the second pass."""
        above = np.cumsum(self._low[::-1])
        place = len(self._low) - 1 - int(np.searchsorted(above, self._rank))
        return _float_of((self._bin << _HIGH_BITS) | place)
