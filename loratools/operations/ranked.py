"""The loop that squeeze, to-lora, extract and merge share: every module gets factors of a rank.

Spectra → ranks → outcomes → errors → size of the file. An operation says how one module is
measured and resized, and which adapter the modules make; the order of the work, the threads, the
record of how the result was made and the size of its file are decided here.
"""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from loratools.algebra.budget import Limit, RankChoice, choose_ranks, rank_table
from loratools.algebra.ranks import RankRule, Spectrum
from loratools.lowrank.planned import PlannedFactors, for_size
from loratools.lowrank.resize import Resizer
from loratools.operations.reported import ratio, written_nbytes
from loratools.work.call import kept
from loratools.work.parallel import done_in_order, in_order
from loratools.work.provenance import record_metadata
from loratools.work.requests import Progress
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.disk.errors import LoratoolsError, OptionError, UnsupportedError, naming
from loratools_formats.disk.provenance import with_record

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of one module; operations add their report.

    Attributes:
        name: module path.
        change: what to write.
        squared_error: ‖ΔW − ΔW'‖²_F of the stored, rounded factors.
        squared_norm: ‖ΔW‖²_F.
    """

    name: str
    change: ModuleChange
    squared_error: float
    squared_norm: float


@dataclass(frozen=True)
class Measured:
    """What choosing ranks asks of one module.

    Attributes:
        spectrum: its singular values.
        like: the factors whose rank is to be replaced, or that are to be made.
    """

    spectrum: Spectrum
    like: PlannedFactors


AnyOutcome = TypeVar("AnyOutcome", bound=Outcome)
AnyMeasured = TypeVar("AnyMeasured", bound=Measured)


@dataclass(frozen=True)
class Finished(Generic[AnyOutcome]):
    """What became of all modules, in order.

    Attributes:
        outcomes: one for each.
        record: how they were made.
    """

    outcomes: tuple[AnyOutcome, ...]
    record: Record

    @property
    def modules(self) -> dict[str, ModuleChange]:
        """The changes to write, by module path."""
        return {outcome.name: outcome.change for outcome in self.outcomes}

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F of all modules together."""
        return sum(outcome.squared_norm for outcome in self.outcomes)

    @property
    def relative_error(self) -> float:
        """‖ΔW − ΔW'‖/‖ΔW‖ of all modules together."""
        return ratio(sum(outcome.squared_error for outcome in self.outcomes), self.squared_norm)


class Ranked(ABC, Generic[AnyOutcome, AnyMeasured]):
    """One run of an operation.

    Args:
        names: every module, in order.
        rule: how ranks are chosen.
        resizer: gives changes other ranks.
        input_nbytes: size of the input's weight file, of which a budget may be a share.
        source: the input's path, for messages.
        chosen: the modules whose rank is chosen, the others keep theirs; all by default.
        groups: names of modules that must have one rank.
        nbytes_of: what an adapter weighs that must keep a budget; by default its weight file.
    """

    def __init__(
        self,
        names: Sequence[str],
        rule: RankRule,
        resizer: Resizer,
        *,
        input_nbytes: int,
        source: Path | None = None,
        chosen: Sequence[str] | None = None,
        groups: Sequence[Sequence[str]] = (),
        nbytes_of: Callable[[Adapter], int] | None = None,
    ) -> None:
        self.names = names
        self.rule = rule
        self.resizer = resizer
        self.options = resizer.options
        self._input_nbytes = input_nbytes
        self._source = source
        self.chosen = names if chosen is None else chosen
        self._groups = groups
        self._nbytes_of = nbytes_of or written_nbytes

    @abstractmethod
    def measured(self, name: str) -> AnyMeasured:
        """Return what choosing the rank of a module asks of it."""

    @abstractmethod
    def outcome(self, name: str, ranks: Mapping[str, int] | None) -> AnyOutcome:
        """Give a module its rank; without ranks, the rule decides for each module alone."""

    @abstractmethod
    def adapter(self, modules: Mapping[str, ModuleChange]) -> Adapter:
        """Return the adapter that these changes make, without a record of how it was made."""

    def changed(self, name: str, factors: LowRank) -> ModuleChange:
        """Return the change of a module that has these factors now."""
        del name
        return ModuleChange(factors)

    def keeps_scale(self, name: str, ranks: Mapping[str, int]) -> bool:
        """Return whether a module may keep a scale that cannot move into its factors."""
        del name, ranks
        return True

    def run(self, record: Callable[[], Record], progress: Progress | None) -> Finished[AnyOutcome]:
        """Give every module its rank.

        Args:
            record: returns how the result is made.
            progress: called with (modules done, modules in all).

        Raises:
            OptionError: the budget is too small, or the rule does not fit.
            AdapterError: NaN or infinite values, or values beyond the type.
        """
        with ThreadPoolExecutor(1) as beside:
            # Digesting the input takes as long as reading it, so it runs beside the arithmetic.
            recorded = beside.submit(kept(record))
            ranks = self._ranks(recorded.result)

            def one(name: str) -> AnyOutcome:
                with self._named(name):
                    return self.outcome(name, ranks)

            outcomes = done_in_order(one, self.names, self.options.threads, progress)
            return Finished(tuple(self._alike(outcomes)), recorded.result())

    def _alike(self, outcomes: Sequence[AnyOutcome]) -> list[AnyOutcome]:
        """Return outcomes of which modules that need one rank have it: the lower ones get zeros."""
        found = {outcome.name: outcome for outcome in outcomes}
        for group in self._groups:
            members = [found[name] for name in group if name in found]
            parts = [each.change.factors for each in members]
            ranks = [part.rank for part in parts if part is not None]
            for each, part in zip(members, parts, strict=True):
                if part is None or part.rank == max(ranks):
                    continue
                wider = self.resizer.without_loss(part, max(ranks))
                if wider is not None:
                    change = each.change.with_direction(wider)
                    found[each.name] = replace(each, change=change)
        return list(found.values())

    def finished(self, modules: Mapping[str, ModuleChange], record: Record) -> Adapter:
        """Return the adapter to write.

        Raises:
            OptionError: its file is larger than the budget, which happens where a scale could not
                move into factors of the type.
        """
        adapter = self._recorded(modules, record)
        if self.rule.budget is not None:
            limit, nbytes = self.rule.budget.resolve(self._input_nbytes), self._nbytes_of(adapter)
            if nbytes > limit:
                raise OptionError(
                    "the budget is too small", got=f"{nbytes} bytes", expected=f"at most {limit}"
                )
        return adapter

    def table(self, measured: Sequence[Measured], other_energy: float = 0.0) -> list[RankChoice]:
        """Return what ranks cost and lose; the record of how a file was made is not counted.

        Args:
            measured: the modules whose rank is chosen.
            other_energy: ‖ΔW‖²_F of the others.
        """

        def size(ranks: Mapping[str, int]) -> int:
            def of(ranks: Mapping[str, int]) -> int:
                return written_nbytes(self.adapter(self._planned(measured, ranks)))

            try:
                return of(ranks)
            except UnsupportedError:  # of a format of one rank, it is what --uniform would give
                return of(dict.fromkeys(ranks, max(ranks.values())))

        return rank_table([each.spectrum for each in measured], size, other_energy)

    def measurements(self) -> Iterator[AnyMeasured]:
        """Yield the measurements of the modules whose rank is chosen, in order."""

        def one(name: str) -> AnyMeasured:
            with self._named(name):
                return self.measured(name)

        return in_order(one, self.chosen, self.options.threads)

    def _ranks(self, record: Callable[[], Record]) -> dict[str, int] | None:
        """Return the ranks that depend on several modules, None if none does."""
        if not self.rule.needs_all_spectra and not (self._groups and self.rule.is_given):
            return None
        measured = list(self.measurements())
        limit = None
        if self.rule.budget is not None:
            limit = Limit(
                self.rule.budget.resolve(self._input_nbytes),
                lambda ranks: self._nbytes_of(
                    self._recorded(self._planned(measured, ranks), record())
                ),
            )
        spectra = [each.spectrum for each in measured]
        return choose_ranks(spectra, self.rule, groups=self._groups, limit=limit)

    def _planned(
        self, measured: Sequence[Measured], ranks: Mapping[str, int]
    ) -> dict[str, ModuleChange]:
        """Return the changes by which a format counts the bytes of the file with these ranks."""
        modules: dict[str, ModuleChange] = {}
        for each in measured:
            name, keep_scale = each.spectrum.name, self.keeps_scale(each.spectrum.name, ranks)
            planned = self.resizer.planned(each.like, ranks[name], keep_scale=keep_scale)
            modules[name] = self.changed(name, for_size(planned))
        return modules

    def _recorded(self, modules: Mapping[str, ModuleChange], record: Record) -> Adapter:
        adapter = self.adapter(modules)
        metadata = with_record(adapter.metadata, record_metadata(record))
        return replace(adapter, metadata=metadata, provenance=record)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Name the module and the file in errors that do not name them."""
        with naming(self._source, name):
            try:
                yield
            except LoratoolsError as error:
                if NOT_FINITE in error.message and error.hint is None:
                    only = shlex.quote(f"^{re.escape(name)}$")
                    error.hint = f"To go on without the module, take it out with `drop`: {only}"
                raise


def share(part: float, whole: float) -> float:
    """Return the part of an energy, at most 1; all of nothing."""
    return min(part / whole, 1.0) if whole else 1.0
