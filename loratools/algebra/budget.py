"""Ranks that depend on all modules together: a common rank, a budget, and the table of choices."""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.once import once
from loratools.algebra.ranks import SERVE_RANKS, RankRule, Spectrum
from loratools.work.json_object import named
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True)
class Limit:
    """What the output's weight file may weigh.

    Attributes:
        nbytes: at most.
        size: the exact size of the file with these ranks.
    """

    nbytes: int
    size: Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class _Unit:
    """Modules that get one rank: a module alone, or all of a group.

    Attributes:
        spectra: of the modules.
        levels: the ranks that they may get, ascending.
    """

    spectra: tuple[Spectrum, ...]
    levels: list[int]

    @property
    def name(self) -> str:
        """Path of its first module."""
        return self.spectra[0].name

    def ranks(self, rank: int) -> dict[str, int]:
        """Return a rank by module."""
        return {spectrum.name: rank for spectrum in self.spectra}

    def price(self, place: int) -> int:
        """Return the bytes of the factors that the step above a place adds."""
        low, high = self.levels[place : place + 2]
        return sum(each.nbytes(high) - each.nbytes(low) for each in self.spectra)

    @once
    def gains(self) -> list[float]:
        """Energy per byte of the step above each level; 0 above the last."""
        energies = [spectrum.energies for spectrum in self.spectra]
        steps = [slice(*step) for step in itertools.pairwise(self.levels)]
        found = [sum(float(each[step].sum()) for each in energies) for step in steps]
        return [gain / self.price(place) for place, gain in enumerate(found)] + [0.0]


def choose_ranks(
    spectra: Sequence[Spectrum],
    rule: RankRule,
    *,
    groups: Sequence[Sequence[str]] = (),
    limit: Limit | None = None,
) -> dict[str, int]:
    """Return the rank of every module.

    Args:
        spectra: of the modules to squeeze.
        rule: how to choose.
        groups: names of modules that need one rank if any of theirs changes.
        limit: what the rule's budget means in bytes; None if the rule has none.

    Raises:
        OptionError: the budget is too small for the smallest ranks.
    """
    names = [[s.name for s in spectra]] if rule.uniform else groups
    together = [tuple(s for s in spectra if s.name in group) for group in names]
    grouped = {s.name for group in together for s in group}
    sets = [group for group in together if group]
    sets += [(s,) for s in spectra if s.name not in grouped]
    if limit is not None:
        return _within([_Unit(each, _levels(each, rule)) for each in sets], rule, limit)
    ranks = {spectrum.name: rule.of_module(spectrum) for spectrum in spectra}
    for each in sets:
        if rule.uniform or any(ranks[s.name] != s.rank for s in each):
            shared = max(ranks[s.name] for s in each)
            if not rule.uniform:
                _refuse_lower(each, rule, shared)
            ranks |= dict.fromkeys((s.name for s in each), shared)
    return ranks


def _refuse_lower(spectra: Sequence[Spectrum], rule: RankRule, rank: int) -> None:
    """Refuse a pattern that gives a module less than the rank that it needs with others.

    Raises:
        OptionError: it does.
    """
    for spectrum in spectra:
        asked = rule.override(spectrum.path)
        if asked is not None and rule.served(min(asked, spectrum.rank)) < rank:
            raise OptionError(
                "the file needs one rank for these modules, and a pattern gives some of them "
                "another",
                got=f"rank {asked} for {spectrum.name}, and {rank} for others",
                hint="Let the pattern match all of them, or none",
            )


def _levels(spectra: Sequence[Spectrum], rule: RankRule) -> list[int]:
    """Return the ranks that modules may get together, ascending."""
    return max((_levels_of(spectrum, rule) for spectrum in spectra), key=lambda found: found[-1])


def _levels_of(spectrum: Spectrum, rule: RankRule) -> list[int]:
    fixed = rule.override(spectrum.path)
    if fixed is not None:
        return [rule.served(min(fixed, spectrum.rank))]
    least = min(rule.min_rank or 1, spectrum.rank)
    most = min(spectrum.rank, rule.max_rank or spectrum.rank)
    if not rule.serve:
        return list(range(least, most + 1))
    return [rank for rank in SERVE_RANKS if least <= rank <= most] or [rule.served(least)]


def _within(units: Sequence[_Unit], rule: RankRule, limit: Limit) -> dict[str, int]:
    """Return the best ranks whose file is no larger than the limit.

    Only the factors' part of a file is known in advance for all ranks. What the rest takes (header,
    alphas, metadata with ranks in it) is measured at the ranks chosen, and they are chosen again
    with less until the file fits.
    """

    def size(places: Mapping[str, int]) -> int:
        ranks: dict[str, int] = {}
        for unit in units:
            ranks |= unit.ranks(unit.levels[places[unit.name]])
        return limit.size(ranks)

    lowest = {unit.name: 0 for unit in units}
    least = size(lowest)
    if least > limit.nbytes:
        raise OptionError(
            "the budget is too small",
            got=f"{limit.nbytes} bytes",
            expected=f"at least {least} bytes, which the smallest ranks take",
        )
    if rule.uniform:
        (unit,) = units
        fitting = bisect.bisect_right(
            range(1, len(unit.levels)), limit.nbytes, key=lambda place: size({unit.name: place})
        )
        return unit.ranks(unit.levels[fitting])
    room = limit.nbytes - least
    places = _spent(units, lowest, room)
    while (over := size(places) - limit.nbytes) > 0:
        room -= over
        places = _spent(units, lowest, room)
    places = _spent(units, places, limit.nbytes - size(places), size, limit.nbytes)
    return {
        name: rank
        for unit in units
        for name, rank in unit.ranks(unit.levels[places[unit.name]]).items()
    }


def _spent(
    units: Sequence[_Unit],
    places: Mapping[str, int],
    room: int,
    size: Callable[[Mapping[str, int]], int] | None = None,
    most: int = 0,
) -> dict[str, int]:
    """Take steps up from places, those first that remove most error per byte.

    Taking the best ratio first is optimal for the total squared error whenever the room is used up,
    since a module's gains only shrink from step to step. Steps that remove nothing are not taken.

    Args:
        units: what can take steps.
        places: where each stands.
        room: bytes that the factors may grow by.
        size: the exact size of the file, which each step is then checked with.
        most: of that size.
    """
    found = dict(places)
    by_name = {unit.name: unit for unit in units}
    heap = [(-unit.gains[found[unit.name]], unit.name) for unit in units]
    heapq.heapify(heap)
    while heap and heap[0][0] < 0.0:
        _, name = heapq.heappop(heap)
        price = by_name[name].price(found[name])
        if price > room:
            continue
        found[name] += 1
        if size is not None and size(found) > most:
            found[name] -= 1
            continue
        room -= price
        heapq.heappush(heap, (-by_name[name].gains[found[name]], name))
    return found


@dataclass(frozen=True, kw_only=True)
class RankChoice:
    """A row of the table rank → size → error.

    Attributes:
        rank: given to every module that has more.
        nbytes: size of the weight file.
        energy: share of ‖ΔW‖²_F kept.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ before rounding to the stored type.
    """

    rank: int
    nbytes: int = named("bytes")
    energy: float
    relative_error: float


def rank_table(
    spectra: Sequence[Spectrum],
    size: Callable[[Mapping[str, int]], int],
    other_energy: float = 0.0,
) -> list[RankChoice]:
    """Return what each power of two, and the present largest rank, would cost and lose.

    Args:
        spectra: of the modules to squeeze.
        size: the size of the weight file with these ranks.
        other_energy: ‖ΔW‖²_F of the modules that stay as they are.
    """
    highest = max(spectrum.rank for spectrum in spectra)
    ranks = [1 << power for power in range(highest.bit_length()) if 1 << power < highest]
    tails = sum(float(np.sum(s.tail)) for s in spectra if s.tail is not None)
    total = sum(float(spectrum.energies.sum()) for spectrum in spectra) + other_energy + tails
    rows = []
    for rank in [*ranks, highest]:
        lost = tails + sum(float(spectrum.energies[rank:].sum()) for spectrum in spectra)
        nbytes = size({s.name: min(rank, s.rank) for s in spectra})
        share = lost / total if total else 0.0
        rows.append(
            RankChoice(rank=rank, nbytes=nbytes, energy=1.0 - share, relative_error=share**0.5)
        )
    return rows
