"""Ranks that depend on all modules together: a common rank, a budget, and the table of choices."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.ranks import SERVE_RANKS, RankRule, Spectrum
from loratools_formats.disk.errors import OptionError


def choose_ranks(
    spectra: Sequence[Spectrum], rule: RankRule, *, input_nbytes: int, fixed_nbytes: int
) -> dict[str, int]:
    """Return the rank of every module.

    Args:
        spectra: of the modules to squeeze.
        rule: how to choose.
        input_nbytes: size of the input's weight file, for a budget given as a share.
        fixed_nbytes: bytes of the output that do not depend on these ranks.

    Raises:
        OptionError: the budget is too small for one rank everywhere.
    """
    if rule.budget is not None:
        available = rule.budget.resolve(input_nbytes) - fixed_nbytes
        return _within(spectra, rule, available)
    ranks = {spectrum.name: rule.of_module(spectrum) for spectrum in spectra}
    if rule.uniform and ranks:
        return dict.fromkeys(ranks, max(ranks.values()))
    return ranks


def _within(spectra: Sequence[Spectrum], rule: RankRule, available: int) -> dict[str, int]:
    """Spend bytes where they remove most error.

    A step up on a module removes energy at a price in bytes. Taking the best ratio first is optimal
    for the total squared error whenever the budget is used up, since a module's gains only shrink
    from step to step. Steps that remove nothing are not taken.
    """
    levels = _common_levels(spectra, rule) if rule.uniform else _levels(spectra, rule)
    ranks = {name: steps[0] for name, steps in levels.items()}
    left = available - sum(ranks[s.name] * s.bytes_per_rank for s in spectra)
    if left < 0:
        raise OptionError(
            "the budget is too small",
            got=f"{max(available, 0)} bytes for the factors",
            expected=f"{available - left} for the smallest ranks; "
            f"raise the budget by at least {-left} bytes",
        )
    if rule.uniform:
        price = sum(s.bytes_per_rank for s in spectra)
        common = next(iter(levels.values()))
        fitting = [rank for rank in common if rank * price <= available]
        return dict.fromkeys(ranks, fitting[-1])
    by_name = {s.name: s for s in spectra}
    heap = [(-_gain(by_name[name], steps, 0), name, 0) for name, steps in levels.items()]
    heapq.heapify(heap)
    while heap and heap[0][0] < 0.0:
        _, name, place = heapq.heappop(heap)
        steps, spectrum = levels[name], by_name[name]
        price = (steps[place + 1] - steps[place]) * spectrum.bytes_per_rank
        if price > left:
            continue
        ranks[name] = steps[place + 1]
        left -= price
        heapq.heappush(heap, (-_gain(spectrum, steps, place + 1), name, place + 1))
    return ranks


def _levels(spectra: Sequence[Spectrum], rule: RankRule) -> dict[str, list[int]]:
    """Return the ranks that each module may get, ascending."""
    return {spectrum.name: _levels_of(spectrum, rule) for spectrum in spectra}


def _levels_of(spectrum: Spectrum, rule: RankRule) -> list[int]:
    fixed = rule.override(spectrum.name)
    if fixed is not None:
        return [rule.served(min(fixed, spectrum.rank))]
    least = min(rule.min_rank or 1, spectrum.rank)
    most = min(spectrum.rank, rule.max_rank or spectrum.rank)
    if not rule.serve:
        return list(range(least, most + 1))
    return [rank for rank in SERVE_RANKS if least <= rank <= most] or [rule.served(least)]


def _common_levels(spectra: Sequence[Spectrum], rule: RankRule) -> dict[str, list[int]]:
    widest = max(spectra, key=lambda spectrum: spectrum.rank)
    return dict.fromkeys((spectrum.name for spectrum in spectra), _levels_of(widest, rule))


def _gain(spectrum: Spectrum, steps: list[int], place: int) -> float:
    """Return the energy per byte of the step above a place; 0 if there is none."""
    if place + 1 >= len(steps):
        return 0.0
    energy = float(spectrum.energies[steps[place] : steps[place + 1]].sum())
    return energy / ((steps[place + 1] - steps[place]) * spectrum.bytes_per_rank)


@dataclass(frozen=True)
class RankChoice:
    """A row of the table rank → size → error.

    Attributes:
        rank: given to every module that has more.
        nbytes: size of the weight file.
        energy: share of ‖ΔW‖²_F kept.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ before rounding to the stored type.
    """

    rank: int
    nbytes: int
    energy: float
    relative_error: float


def rank_table(
    spectra: Sequence[Spectrum], fixed_nbytes: int, other_energy: float = 0.0
) -> list[RankChoice]:
    """Return what each power of two, and the present largest rank, would cost and lose.

    Args:
        spectra: of the modules to squeeze.
        fixed_nbytes: bytes of the output that do not depend on these ranks.
        other_energy: ‖ΔW‖²_F of the modules that stay as they are.
    """
    highest = max(spectrum.rank for spectrum in spectra)
    ranks = [1 << power for power in range(highest.bit_length()) if 1 << power < highest]
    tails = sum(float(np.sum(s.tail)) for s in spectra if s.tail is not None)
    total = sum(float(np.sum(spectrum.energies)) for spectrum in spectra) + other_energy + tails
    rows = []
    for rank in [*ranks, highest]:
        lost = tails + sum(float(np.sum(spectrum.energies[rank:])) for spectrum in spectra)
        nbytes = sum(min(rank, s.rank) * s.bytes_per_rank for s in spectra) + fixed_nbytes
        share = lost / total if total else 0.0
        rows.append(RankChoice(rank, nbytes, 1.0 - share, share**0.5))
    return rows
