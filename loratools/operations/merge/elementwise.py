"""Methods that need single entries of ΔW: trimming, random dropping, sign election.

Every one is a sparsifier, which keeps some entries of each task, and a way to combine what is left.
Where published definitions differ, `flavor` chooses: `peft` is what PEFT's functions do to dense
ΔW, `mergekit` what mergekit 0.1.5 does, `paper` what the paper says.

flavor     trim of ties  sign elected on  divided by            drop rescaled by
peft       per module    raw entries      number that agree     1/density
paper      all modules   weighted entries number that agree     1/density (della: 1/p)
mergekit   per module    weighted entries weight that agrees    the L1 norm before/after
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np

from loratools.operations.merge.methods import Method
from loratools.operations.merge.sign_election import Flavor, MajoritySign, elected
from loratools.operations.merge.tasks import RowReader, Tasks
from loratools.operations.merge.weightless import says_nothing
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import OptionError


def _checked_density(density: float) -> float:
    if not 0.0 <= density <= 1.0:
        raise OptionError("density is a share", got=density, expected="from 0 to 1")
    return density


def _top(tasks: Tasks, density: float, flavor: Flavor) -> RowReader:
    """Keep the entries of largest magnitude of each task, those equal to the last one included."""
    if _checked_density(density) >= 1.0:
        return tasks.block
    least = 1 if flavor == "mergekit" and density > 0.0 else 0
    keep = max(least, int(density * (tasks.shape[0] * tasks.shape[1])))
    if flavor == "paper" and tasks.share_threshold is not None:
        thresholds = [tasks.share_threshold(task, density) for task in range(tasks.count)]
    else:
        thresholds = [tasks.largest_magnitudes(task, [keep])[0] for task in range(tasks.count)]
    limits = np.array(thresholds, np.float32)

    def rows(start: int, stop: int) -> Array:
        block = tasks.block(start, stop)
        for values, limit in zip(block, limits, strict=True):
            np.multiply(values, np.abs(values) >= limit, out=values)  # ten times as fast as where
        return block

    return rows


def _dropped(tasks: Tasks, keep: Callable[[Array], Array | float], rescale: str) -> RowReader:
    """Keep entries at random: each with the probability that `keep` gives it."""

    def one(task: int, start: int, stop: int) -> tuple[Array, Array]:
        """Return rows of a task before and after."""
        entries = tasks.sources[task].rows(start, stop)
        chances = keep(entries)
        kept = entries.astype(np.float64)
        kept *= tasks.random_rows(task, start, stop) < _in_single(chances)
        if rescale == "chance":
            kept /= chances
        return entries, kept

    def norms(task: int, start: int, stop: int) -> tuple[float, float]:
        """Return the L1 norms of rows of a task before and after."""
        entries, kept = one(task, start, stop)
        before = np.abs(entries, out=entries).sum(dtype=np.float64)
        return float(before), float(np.abs(kept, out=kept).sum())

    ratios = np.ones(tasks.count)
    if rescale == "l1":
        for task in range(tasks.count):
            before = after = 0.0
            for of_entries, of_kept in tasks.each(functools.partial(norms, task)):
                before += of_entries
                after += of_kept
            ratios[task] = before / after if min(before, after) >= 1e-7 else 1.0

    def rows(start: int, stop: int) -> Array:
        found = np.empty((tasks.count, stop - start, tasks.shape[1]))
        for task, ratio in enumerate(ratios):
            np.multiply(ratio, one(task, start, stop)[1], out=found[task])
        return found

    return rows


def _in_single(chances: Array | float) -> Array | np.float32:
    """Return what float32 numbers are below just where they are below the chances."""
    if isinstance(chances, float):
        nearest = np.float32(chances)
        return nearest if nearest >= chances else np.nextafter(nearest, np.float32(np.inf))
    return chances


def places_in_rows(magnitudes: Array) -> Array:
    """Return the place of each entry in its row from the smallest, from 0; of equals, the first.

    Sorts the bits of each number, which for non-negative ones are in their order, with its column
    below them: five times as fast as sorting places.

    Args:
        magnitudes: (m, n) float32, not negative.
    """
    columns = np.arange(magnitudes.shape[1], dtype=np.uint64)
    keys = np.left_shift(magnitudes.view(np.uint32), np.uint64(32), dtype=np.uint64)
    keys |= columns
    keys.sort(axis=1)
    keys &= np.uint64(0xFFFFFFFF)
    places = np.empty(magnitudes.shape, np.int64)
    for row, order in zip(places, keys.astype(np.int64), strict=True):
        row[order] = columns
    return places


def _bernoulli(tasks: Tasks, density: float, flavor: Flavor) -> RowReader:
    if _checked_density(density) >= 1.0:
        return tasks.block
    if density <= 0.0:
        raise OptionError("density is too small for dropping at random", got=density)
    rescale = "l1" if flavor == "mergekit" else "chance"
    return _dropped(tasks, lambda _: density, rescale)


def _summed(rows: RowReader, weights: Array, scale: float) -> RowReader:
    """Σ wₜ·xₜ."""
    factors = [float(weight) for weight in weights]

    def merged(start: int, stop: int) -> Array:
        entries = rows(start, stop)
        total = np.zeros(entries.shape[1:])
        part = np.empty_like(total)
        for values, factor in zip(entries, factors, strict=True):
            np.multiply(values, factor, out=part, dtype=np.float64)
            total += part
        total *= scale
        return total

    return merged


def ties(
    tasks: Tasks,
    weights: Array,
    *,
    density: float = 0.2,
    majority_sign: MajoritySign = "total",
    flavor: Flavor = "peft",
    lambda_: float = 1.0,
) -> RowReader:
    """Trim to the largest entries, elect signs, average what agrees."""
    return elected(_top(tasks, density, flavor), weights, lambda_, majority_sign, flavor)


def magnitude_prune(
    tasks: Tasks,
    weights: Array,
    *,
    density: float = 0.2,
    flavor: Flavor = "peft",
    lambda_: float = 1.0,
) -> RowReader:
    """Trim to the largest entries, then a weighted sum."""
    return _summed(_top(tasks, density, flavor), weights, lambda_)


def dare_linear(
    tasks: Tasks,
    weights: Array,
    *,
    density: float = 0.5,
    flavor: Flavor = "peft",
    lambda_: float = 1.0,
) -> RowReader:
    """Drop entries at random, rescale, then a weighted sum."""
    return _summed(_bernoulli(tasks, density, flavor), weights, lambda_)


def dare_ties(
    tasks: Tasks,
    weights: Array,
    *,
    density: float = 0.5,
    majority_sign: MajoritySign = "total",
    flavor: Flavor = "peft",
    lambda_: float = 1.0,
) -> RowReader:
    """Drop entries at random, rescale, elect signs, combine what agrees."""
    rows = _bernoulli(tasks, density, flavor)
    normalize = flavor != "mergekit"
    return elected(rows, weights, lambda_, majority_sign, flavor, normalize)


def della(
    tasks: Tasks,
    weights: Array,
    *,
    density: float = 0.5,
    epsilon: float = 0.15,
    majority_sign: MajoritySign = "total",
    flavor: Literal["paper", "mergekit"] = "paper",
    lambda_: float = 1.0,
) -> RowReader:
    """Drop entries at random, small ones of a row more likely, elect signs, combine.

    The i-th smallest of n entries of a row is kept with p = density − ε + 2ε(i−1)/(n−1).
    """
    if _checked_density(density) >= 1.0:
        return elected(tasks.block, weights, lambda_, majority_sign, flavor)
    if not 0.0 < density - epsilon <= density + epsilon < 1.0:
        raise OptionError(
            "density ± epsilon must stay inside (0, 1)", got=f"{density:g} ± {epsilon:g}"
        )

    def chances(entries: Array) -> Array:
        share: Array = places_in_rows(np.abs(entries)) / max(entries.shape[1] - 1, 1)
        share *= 2.0 * epsilon
        share += density - epsilon
        return share

    rows = _dropped(tasks, chances, "l1" if flavor == "mergekit" else "chance")
    return elected(rows, weights, lambda_, majority_sign, flavor)


def breadcrumbs(
    tasks: Tasks, weights: Array, *, density: float = 0.9, gamma: float = 0.01, lambda_: float = 1.0
) -> RowReader:
    """Drop the share gamma of largest entries and the smallest ones down to density, then sum."""
    elements = tasks.shape[0] * tasks.shape[1]
    target = int(_checked_density(density) * elements)
    if density >= 1.0:
        return _summed(tasks.block, weights, lambda_)
    if not 0.0 <= gamma < 1.0:
        raise OptionError("gamma is a share", got=gamma, expected="from 0, below 1")
    below = max(0, elements - target - int(gamma * elements))
    highest, lowest = elements - below - target + 1, elements - below
    bounds = [tasks.largest_magnitudes(t, (lowest, highest)) for t in range(tasks.count)]
    limits = np.array(bounds, np.float32)

    def rows(start: int, stop: int) -> Array:
        block = tasks.block(start, stop)
        for values, (low, high) in zip(block, limits, strict=True):
            magnitudes = np.abs(values)
            inside = magnitudes >= low
            inside &= magnitudes <= high
            np.multiply(values, inside if target else np.float32(0), out=values)
        return block

    return _summed(rows, weights, lambda_)


def sce(tasks: Tasks, weights: Array, *, density: float = 1.0, lambda_: float = 1.0) -> RowReader:
    """Select where tasks vary most, weigh tasks by their energy there, erase minority signs.

    Raises:
        OptionError: weights that the method has no place for: they differ, or are not above 0.
    """
    if not says_nothing(weights):
        raise OptionError("sce weighs adapters itself and takes no weights", got=weights.tolist())

    def variance(start: int, stop: int) -> Array:
        block = tasks.block(start, stop).astype(np.float64)
        spread: Array = block.var(axis=0).astype(np.float32)
        return spread

    rows: RowReader = tasks.block
    if _checked_density(density) < 1.0:
        limit = np.float32(tasks.kth_largest(variance, int(tasks.nonzero(variance) * density)))

        def rows(start: int, stop: int) -> Array:
            block = tasks.block(start, stop)
            return np.where(variance(start, stop) >= limit, block, np.float32(0))

    def energies_of(start: int, stop: int) -> Array:
        energies: Array = (rows(start, stop).astype(np.float64) ** 2).sum(axis=(1, 2))
        return energies

    energies = sum(tasks.each(energies_of), np.zeros(tasks.count))
    total = float(energies.sum())
    shares = energies / total if total > 0.0 else np.full(tasks.count, 1.0 / tasks.count)

    def merged(start: int, stop: int) -> Array:
        entries = rows(start, stop).astype(np.float64)
        sign = np.where(entries.sum(axis=0) >= 0.0, 1.0, -1.0)
        kept = np.where(np.sign(entries) == sign, shares[:, None, None], 0.0)
        total = lambda_ * (kept * entries).sum(axis=0)
        result: Array = total / np.maximum(kept.sum(axis=0), 1e-6)
        return result

    return merged


TIES = Method(
    "ties",
    "elementwise",
    "Trim, elect signs, average what agrees.",
    "arXiv 2306.01708",
    ties,
    scales=True,
)
MAGNITUDE_PRUNE = Method(
    "magnitude_prune",
    "elementwise",
    "Trim to the largest entries, then sum.",
    "PEFT merge_utils",
    magnitude_prune,
    scales=True,
)
DARE_LINEAR = Method(
    "dare_linear",
    "elementwise",
    "Drop at random and rescale, then sum.",
    "arXiv 2311.03099",
    dare_linear,
    scales=True,
)
DARE_TIES = Method(
    "dare_ties",
    "elementwise",
    "Drop at random, rescale, elect signs.",
    "arXiv 2311.03099",
    dare_ties,
    scales=True,
)
DELLA = Method(
    "della",
    "elementwise",
    "Drop small entries more likely, elect signs.",
    "arXiv 2406.11617",
    della,
    scales=True,
)
BREADCRUMBS = Method(
    "breadcrumbs",
    "elementwise",
    "Drop the largest and the smallest entries, then sum.",
    "arXiv 2312.06795",
    breadcrumbs,
    scales=True,
)
SCE = Method(
    "sce",
    "elementwise",
    "Select by variance, weigh by energy, erase minority signs.",
    "arXiv 2408.07990",
    sce,
)
