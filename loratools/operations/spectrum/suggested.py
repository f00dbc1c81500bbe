"""Ranks that rules would choose: the numbers of `squeeze`, from spectra that are known already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from loratools.algebra.budget import RankChoice, choose_ranks, rank_table
from loratools.algebra.measures import knee
from loratools.algebra.ranks import RankRule, Spectrum
from loratools.folding.thin_modules import ThinModule, ThinModules
from loratools.folding.without_base import plain_adapter
from loratools.lowrank.planned import for_size
from loratools.lowrank.resize import ComputeOptions, Resizer
from loratools.operations.reported import ratio, written_nbytes
from loratools.operations.spectrum.result import Suggestion
from loratools.work.scratch import Scratch
from loratools_formats.core.change import ModuleChange
from loratools_formats.disk.errors import UnsupportedError

Size = Callable[[Mapping[str, int]], int]

_RULES = (
    ("--energy 0.9", RankRule(energy=0.9)),
    ("--energy 0.95", RankRule(energy=0.95)),
    ("--energy 0.99", RankRule(energy=0.99)),
    ("--threshold-rank", RankRule(threshold=True)),
)


def table(opener: ThinModules, modules: Sequence[ThinModule]) -> tuple[RankChoice, ...]:
    """Return rank → size → error, as `squeeze` without a rule prints it."""
    return tuple(rank_table([module.spectrum for module in modules], _size(opener, modules)))


def suggestions(opener: ThinModules, modules: Sequence[ThinModule]) -> tuple[Suggestion, ...]:
    """Return what rules for ranks would give; none where singular values are not all known."""
    spectra = [module.spectrum for module in modules]
    if any(spectrum.tail is not None for spectrum in spectra):
        return ()
    size = _size(opener, modules)
    total = sum(float(spectrum.energies.sum()) for spectrum in spectra)

    def of(rule: str, ranks: dict[str, int]) -> Suggestion:
        lost = sum(float(spectrum.energies[ranks[spectrum.name] :].sum()) for spectrum in spectra)
        error = ratio(lost, total)
        return Suggestion(rule=rule, ranks=ranks, nbytes=size(ranks), relative_error=error)

    found = [of(text, choose_ranks(spectra, rule)) for text, rule in _RULES]
    return (*found, of("knee", {spectrum.name: _knee(spectrum) for spectrum in spectra}))


def _size(opener: ThinModules, modules: Sequence[ThinModule]) -> Size:
    """Return the size of the weight file as a function of ranks.

    A DoRA that is given by its direction keeps its magnitudes; with a base it becomes plain
    factors, as a kind that has none does.
    """
    resizer = Resizer(ComputeOptions(), Scratch(), one_scale=False)
    whole = opener.adapter.modules
    folds = any(opener.modules[m.name].is_dora or m.rank is None for m in modules)

    def of(ranks: Mapping[str, int]) -> int:
        new = {m.name: for_size(resizer.planned(m.like, ranks[m.name])) for m in modules}
        if folds:
            plain = {name: ModuleChange(factors) for name, factors in new.items()}
            return written_nbytes(plain_adapter(opener.adapter, plain))
        changes = {name: whole[name].with_direction(factors) for name, factors in new.items()}
        return written_nbytes(replace(opener.adapter, modules=changes))

    def size(ranks: Mapping[str, int]) -> int:
        try:
            return of(ranks)
        except UnsupportedError:  # of a format of one rank, it is the size with the largest
            return of(dict.fromkeys(ranks, max(ranks.values())))

    return size


def _knee(spectrum: Spectrum) -> int:
    """Return the largest knee of a module's matrices."""
    return min(spectrum.rank, max(knee(row) for row in spectrum.singular_values))
