"""Ranks that rules would choose: the numbers of `squeeze`, from spectra that are known already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loratools.algebra.budget import RankChoice, choose_ranks, rank_table
from loratools.algebra.measures import knee
from loratools.algebra.ranks import RankRule, Spectrum
from loratools.operations.spectrum.result import Suggestion
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter, Delta, LowRank, low_rank_part

_RULES = (
    ("--energy 0.9", RankRule(energy=0.9)),
    ("--energy 0.95", RankRule(energy=0.95)),
    ("--energy 0.99", RankRule(energy=0.99)),
    ("--threshold-rank", RankRule(threshold=True)),
)
_HEADER_BYTES = 256  # of a module that becomes factors, beside its name twice


def fixed_nbytes(adapter: Adapter, opened: Mapping[str, Delta]) -> int:
    """Return the bytes of the weight file that ranks do not change.

    Exact where all modules have factors; where some must be folded first, about.

    Args:
        adapter: as read.
        opened: its changes as they were measured: with a base, a DoRA is to be folded.
    """
    deltas = adapter.modules
    if all(isinstance(delta, LowRank) for delta in opened.values()):
        planned = get_format(adapter.format).weights_nbytes
        whole = sum(t.nbytes for t in adapter.tensors()) if planned is None else planned(adapter)
        parts = [low_rank_part(delta) for delta in deltas.values()]
        return whole - sum(part.a.nbytes + part.b.nbytes for part in parts)
    others = [*(r.tensor for r in adapter.replacements.values()), *adapter.carried.values()]
    others += [addition.tensor for addition in adapter.additions.values()]
    return sum(t.nbytes for t in others) + sum(_HEADER_BYTES + 2 * len(name) for name in deltas)


def table(spectra: Sequence[Spectrum], fixed: int) -> tuple[RankChoice, ...]:
    """Return rank → size → error, as `squeeze` without a rule prints it."""
    return tuple(rank_table(spectra, fixed))


def suggestions(spectra: Sequence[Spectrum], fixed: int) -> tuple[Suggestion, ...]:
    """Return what rules for ranks would give; none where singular values are not all known."""
    if any(spectrum.tail is not None for spectrum in spectra):
        return ()

    def of(rule: str, ranks: dict[str, int]) -> Suggestion:
        total = sum(float(spectrum.energies.sum()) for spectrum in spectra)
        lost = sum(float(spectrum.energies[ranks[spectrum.name] :].sum()) for spectrum in spectra)
        nbytes = fixed + sum(ranks[s.name] * s.bytes_per_rank for s in spectra)
        return Suggestion(rule, ranks, nbytes, math.sqrt(lost / total) if total else 0.0)

    found = [
        of(text, choose_ranks(spectra, rule, input_nbytes=0, fixed_nbytes=0))
        for text, rule in _RULES
    ]
    return (*found, of("knee", {spectrum.name: _knee(spectrum) for spectrum in spectra}))


def _knee(spectrum: Spectrum) -> int:
    """Return the largest knee of a module's matrices."""
    return min(spectrum.rank, max(knee(row) for row in spectrum.singular_values))
