"""The election of TIES: which sign each entry of a merge gets, and what the winners add up to.

TIES, DARE-TIES, DELLA and breadcrumbs elect; what they trim or drop before is in `elementwise`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from loratools.operations.merge.tasks import RowReader
from loratools_formats.core.dtypes import Array

MajoritySign = Literal["total", "frequency"]
Flavor = Literal["peft", "paper", "mergekit"]


def elected(
    rows: RowReader,
    weights: Array,
    scale: float,
    majority_sign: MajoritySign,
    flavor: Flavor,
    normalize: bool = True,
) -> RowReader:
    """Elect a sign for each entry and average the tasks that agree with it.

    Votes and sums are float64, one task after another. A task agrees where its vote times the sign
    is positive; by that sign its entries have no other than positive parts, so that no entry has to
    be chosen, which costs ten times as much as the arithmetic.
    """
    votes_raw = flavor == "peft"
    factors = [float(weight) for weight in weights]
    own = [1.0 if votes_raw else float(np.sign(weight)) for weight in factors]
    sizes = [weight if votes_raw else abs(weight) for weight in factors]
    powers = [1.0] * len(factors) if votes_raw else factors

    def merged(start: int, stop: int) -> Array:
        entries = rows(start, stop)
        sign = _winner(entries, powers, majority_sign)
        for values, of_task in zip(entries, own, strict=True):
            np.multiply(values, sign, out=values)
            if of_task != 1.0:
                np.multiply(values, entries.dtype.type(of_task), out=values)
        np.maximum(entries, entries.dtype.type(0), out=entries)
        total = np.zeros(sign.shape)
        part = np.empty_like(total)
        for values, size in zip(entries, sizes, strict=True):
            total += _weighed(values, size, part)
        total *= sign
        total *= scale
        if normalize and flavor == "mergekit":
            total /= _weight_of(entries, factors)
        elif normalize:
            total /= _number_of(entries)
        return total

    return merged


def _weighed(values: Array, weight: float, out: Array) -> Array:
    """Return weight · values in float64, written to `out`."""
    np.copyto(out, values)
    if weight != 1.0:
        np.multiply(out, weight, out=out)
    return out


def _winner(entries: Array, powers: list[float], majority_sign: MajoritySign) -> Array:
    """Return ±1 for each place, in the type of the entries: the sign that has the most votes.

    Args:
        entries: (T, m, n).
        powers: of the tasks' votes.
        majority_sign: whether votes count by their size or one each.
    """
    votes = np.zeros(entries.shape[1:])
    part = np.empty_like(votes)
    for values, power in zip(entries, powers, strict=True):
        vote = _weighed(values, power, part)
        votes += np.sign(vote, out=vote) if majority_sign == "frequency" else vote
    sign: Array = (votes >= 0.0).astype(entries.dtype)
    sign *= 2
    sign -= 1
    return sign


def _number_of(agreeing: Array) -> Array:
    """Return how many tasks agree at each place, at least 1."""
    number = np.zeros(agreeing.shape[1:], np.int8 if len(agreeing) < 128 else np.int64)
    for values in agreeing:
        number += values > 0
    return np.maximum(number, 1, out=number)


def _weight_of(agreeing: Array, weights: list[float]) -> Array:
    """Return the weight of the tasks that agree at each place, 1 where it is 0."""
    weight = np.zeros(agreeing.shape[1:])
    for values, of_task in zip(agreeing, weights, strict=True):
        weight += np.multiply(values > 0, of_task, dtype=np.float64)
    weight[weight == 0.0] = 1.0
    return weight
