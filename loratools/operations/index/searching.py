"""`similar` and `dedup`: neighbours by sketches, and their exact cosines where it matters.

Sketches say which pairs are worth a look, with a stated error; adapters that still have the content
which the index knows are then compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loratools.algebra.sketch import standard_errors
from loratools.operations.index.exact import exact_cosine
from loratools.operations.index.file import Entry, Index, Row
from loratools.operations.index.sketching import digest_of
from loratools.work.declared import option
from loratools.work.typed import check_options
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import LoratoolsError, OptionError

_SURE = 5.0  # standard errors within which an estimate is taken to be
_ROWS = 1024

Read = Callable[[Path | str], Adapter]


@dataclass(frozen=True)
class SearchOptions:
    """How to look for neighbours.

    Attributes:
        top: number of neighbours to list.
        exact: compare candidates exactly if they have not changed since they were indexed.

    Raises:
        OptionError: a number out of range.
    """

    top: int = option(10, heading="Method")
    exact: bool = option(True, heading="Method")

    def __post_init__(self) -> None:
        check_options(self)
        if self.top < 1:
            raise OptionError("too few neighbours", got=self.top, expected="at least 1")


@dataclass(frozen=True)
class DedupOptions:
    """What counts as a duplicate.

    Attributes:
        threshold: the least cosine at which two adapters are near-duplicates.
        same_start: the least cosine of A factors at which two adapters had the same start.
        exact: compare candidates exactly if they have not changed since they were indexed.

    Raises:
        OptionError: a number out of range.
    """

    threshold: float = option(0.99, heading="Method")
    same_start: float = option(0.5, heading="Method")
    exact: bool = option(True, heading="Method")

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("threshold", "same_start"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise OptionError(
                    f"{name} is a cosine", got=getattr(self, name), expected="above 0, at most 1"
                )


@dataclass(frozen=True)
class Neighbour:
    """An adapter of an index that is near to another.

    Attributes:
        path: where it lies.
        estimate: of the cosine of both ΔW, from sketches; what one lacks counts as zero.
        standard_error: of the estimate.
        cosine: exact; None if it was not computed, or the adapter is not as the index knows it.
        a_estimate: of the cosine of the A factors; None where there are none.
        same_a: whether the A factors are the same bits.
    """

    path: str
    estimate: float
    standard_error: float
    cosine: float | None
    a_estimate: float | None
    same_a: bool


@dataclass(frozen=True)
class Duplicate:
    """Two adapters that are nearly the same.

    Attributes:
        first: path of one.
        second: path of the other.
        estimate: of the cosine.
        standard_error: of the estimate.
        cosine: exact; None if it was not computed.
        norm_ratio: ‖ΔW₂‖/‖ΔW₁‖.
    """

    first: str
    second: str
    estimate: float
    standard_error: float
    cosine: float | None
    norm_ratio: float


@dataclass(frozen=True)
class Duplicates:
    """What an index says of copies and kin.

    Attributes:
        pairs: near-duplicates.
        groups: the same, joined.
        same_a: groups whose A factors are the same bits, such as of training with A frozen.
        same_start: groups joined by cosines of A, such as of training from one initialisation.
        unverified: paths of adapters that are gone or changed since.
    """

    pairs: tuple[Duplicate, ...]
    groups: tuple[tuple[str, ...], ...]
    same_a: tuple[tuple[str, ...], ...]
    same_start: tuple[tuple[str, ...], ...]
    unverified: tuple[str, ...]


class Originals:
    """Opens adapters of an index that are as it knows them.

    Args:
        folder: of the index.
        read: opens an adapter, by its path or its reference.
    """

    def __init__(self, folder: Path, read: Read) -> None:
        self._folder, self._read = folder, read
        self._known: dict[str, bool] = {}
        self.missing: list[str] = []

    def open(self, entry: Entry) -> Adapter | None:
        """Return an adapter; None if it is gone, or another by now."""
        if self._known.get(entry.path) is False:
            return None
        try:
            is_here = not entry.path.startswith("hf://")
            adapter = self._read(self._folder / entry.path if is_here else entry.path)
            known = self._known.get(entry.path) or digest_of(adapter) == entry.digest
        except LoratoolsError:
            known = False
        self._known[entry.path] = known
        if not known:
            self.missing.append(entry.path)
        return adapter if known else None


def neighbours(
    index: Index, row: Row, adapter: Adapter, options: SearchOptions, originals: Originals
) -> tuple[Neighbour, ...]:
    """Return the adapters of an index that are nearest to one, the nearest first.

    Args:
        index: where to look.
        row: of the adapter.
        adapter: itself, for exact cosines.
        options: how to look.
        originals: opens those of the index.
    """
    estimates = index.sketch.astype(np.float64) @ row.sketch
    errors = standard_errors(index.shares_of(row), index.shares)[0]
    of_a = index.a_sketch.astype(np.float64) @ row.a_sketch
    # The exact order among those near the last one is not known before they are compared.
    order = [int(i) for i in np.argsort(-estimates, kind="stable")]
    wanted = order[: options.top]
    if options.exact and len(order) > options.top:
        last = estimates[order[options.top - 1]]
        reach = [i for i in order if estimates[i] >= last - _SURE * errors[i]]
        wanted = reach[: 2 * options.top]
    found = []
    for place in wanted:
        entry = index.entries[place]
        other = originals.open(entry) if options.exact else None
        found.append(
            Neighbour(
                path=entry.path,
                estimate=_clipped(estimates[place]),
                standard_error=float(errors[place]),
                cosine=None if other is None else exact_cosine(adapter, other),
                a_estimate=_clipped(of_a[place]) if entry.a_digest and row.entry.a_digest else None,
                same_a=bool(entry.a_digest) and entry.a_digest == row.entry.a_digest,
            )
        )
    found.sort(key=lambda one: -(one.estimate if one.cosine is None else one.cosine))
    return tuple(found[: options.top])


def duplicates(index: Index, options: DedupOptions, originals: Originals) -> Duplicates:
    """Return near-duplicates, and groups of one start, in an index.

    Args:
        index: where to look.
        options: what counts.
        originals: opens adapters of the index, for exact cosines.
    """
    pairs = []
    for i, j, estimate, error in _candidates(index, options.threshold):
        one, other = index.entries[i], index.entries[j]
        cosine = None
        if options.exact:
            first = originals.open(one)
            second = None if first is None else originals.open(other)
            if first is not None and second is not None:
                cosine = exact_cosine(first, second)
        if (estimate if cosine is None else cosine) >= options.threshold:
            ratio = other.norm / one.norm
            pairs.append(Duplicate(one.path, other.path, estimate, error, cosine, ratio))
    paths = [entry.path for entry in index.entries]
    joined = _groups(paths, [(one.first, one.second) for one in pairs])
    digests: dict[str, list[str]] = {}
    for entry in index.entries:
        if entry.a_digest:
            digests.setdefault(entry.a_digest, []).append(entry.path)
    same_a = tuple(tuple(group) for group in digests.values() if len(group) > 1)
    begun = [(paths[i], paths[j]) for i, j, _ in _above(index.a_sketch, options.same_start)] + [
        (group[0], path) for group in same_a for path in group[1:]
    ]
    return Duplicates(tuple(pairs), joined, same_a, _groups(paths, begun), tuple(originals.missing))


def _candidates(index: Index, threshold: float) -> Iterator[tuple[int, int, float, float]]:
    """Yield pairs whose cosine may reach a threshold, with its estimate and standard error."""
    worst = float(np.sqrt(standard_errors(np.ones((1, 1)), np.ones((1, 1)))[0, 0] ** 2))
    slack = _SURE * worst * (1.0 - threshold**2) + 1e-6
    for i, j, estimate in _above(index.sketch, threshold - slack):
        error = float(standard_errors(index.shares[i : i + 1], index.shares[j : j + 1])[0, 0])
        if estimate >= threshold - _SURE * error * (1.0 - threshold**2) - 1e-6:
            yield i, j, estimate, error


def _above(sketches: Array, least: float) -> Iterator[tuple[int, int, float]]:
    """Yield (i, j, product) of all pairs i < j whose product is at least a number."""
    for start in range(0, len(sketches), _ROWS):
        products = sketches[start : start + _ROWS] @ sketches.T
        for i, j in np.argwhere(products >= least):
            if start + i < j:
                yield int(start + i), int(j), _clipped(products[i, j])


def _clipped(value: float) -> float:
    return float(min(1.0, max(-1.0, value)))


def _groups(paths: Sequence[str], pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Return what pairs join, each group in the order of the index."""
    leader = {path: path for path in paths}

    def first(path: str) -> str:
        while leader[path] != path:
            leader[path] = path = leader[leader[path]]
        return path

    for one, other in pairs:
        heads = sorted((first(one), first(other)), key=paths.index)
        leader[heads[1]] = heads[0]
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(first(path), []).append(path)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
