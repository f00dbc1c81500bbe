"""What squeezing each adapter alone would lose, at the size that a shared set takes.

The comparison that a set has to stand: the same bytes, spent on the leading singular triplets of
each adapter by itself. They are spent where they remove most of the error that the set minimises,
over all adapters and modules together, in the type of the set and before rounding: no way to
squeeze adapters one by one loses less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loratools.operations.reported import ratio
from loratools_formats.core.dtypes import Array


class Alone:
    """Collects singular values, and says what a number of bytes would keep of them."""

    def __init__(self) -> None:
        self._energies: list[Array] = []
        self._weights: list[float] = []
        self._prices: list[int] = []
        self._members: list[int] = []

    def add(self, member: int, values: Array, weight: float, price: int) -> None:
        """Add one matrix.

        Args:
            member: whose.
            values: singular values, descending.
            weight: what its squared error counts.
            price: bytes of one triplet.
        """
        self._energies.append(np.square(values))
        self._weights.append(weight)
        self._prices.append(price)
        self._members.append(member)

    def squared_errors(self, count: int, nbytes: int) -> Array:
        """Return what is lost of each of `count` members where all triplets take `nbytes` bytes."""
        lengths = [len(each) for each in self._energies]
        energies = np.concatenate([*self._energies, np.zeros(0)])
        prices = np.repeat(np.asarray(self._prices, float), lengths)
        members = np.repeat(np.asarray(self._members, int), lengths)
        order = np.argsort(-energies * np.repeat(self._weights, lengths) / prices, kind="stable")
        lost = order[np.cumsum(prices[order]) > nbytes]
        return np.bincount(members[lost], energies[lost], count)


def total(errors: Sequence[float] | Array, norms: Sequence[float] | Array) -> float:
    """Return ‖ΔW − ΔW'‖/‖ΔW‖ over everything, from squares."""
    return ratio(float(np.sum(errors)), float(np.sum(norms)))
