"""`share`: adapters of one base model in shared bases, each with a core of its own.

What it does: bring adapters under one naming, group those whose spaces overlap, find for each
module of each group the bases that keep most of all ΔWᵢ, fit every adapter's core to the bases as
they are stored, and state the error that what is stored has, beside the least that squeezing each
adapter alone to the same size would have. Every module is read by itself.

What it does not: form ΔW, look at factors other than as ΔW, or keep DoRAs, which need the base.
Sources: arXiv 2407.00066 (JD-Full, JD-Diag, groups), 2602.06043 (principal subspaces).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loratools.algebra.budget import Limit, choose_ranks
from loratools.algebra.joint import Triplets
from loratools.algebra.ranks import RankRule, Spectrum, as_options
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.align import MergeInput, align
from loratools.operations.shared.alone import Alone, total
from loratools.operations.shared.bases import Made, made
from loratools.operations.shared.members import (
    entrant,
    left_beside,
    member_of,
)
from loratools.operations.shared.options import ShareOptions
from loratools.operations.shared.reassigning import fixed_ranks, reassigned
from loratools.operations.shared.result import Shared, SharedAdapter, SharedModuleReport
from loratools.operations.shared.survey import Survey, survey
from loratools.operations.shared.units import Fleet, Unit
from loratools.work.parallel import in_order
from loratools.work.provenance import operation_record, record_metadata
from loratools.work.requests import Progress
from loratools.work.scratch import Scratch
from loratools_formats.containers.safetensors_write import safetensors_nbytes
from loratools_formats.contract.shared_set import (
    FORMAT,
    Part,
    SharedModule,
    SharedSet,
    findings_of,
    metadata_of,
    tensors_of,
)
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.dtypes import Array
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, OptionError
from loratools_formats.disk.provenance import with_record

_SAMPLED = 8  # modules on which numbers of groups are tried
_KEPT = 0.9  # of the energy, if the rule for ranks does not say


def share(
    adapters: Mapping[str, Adapter],
    rule: RankRule,
    compute: ComputeOptions,
    options: ShareOptions,
    *,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> Shared:
    """Bring adapters into shared bases.

    Args:
        adapters: by the names that they will go by.
        rule: how the ranks of bases are chosen.
        compute: threads, and the type to store.
        options: how to share.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: different base models, options that do not fit, or a budget that is too small.
        AdapterError: modules that differ, adapters that are zero, or values that are not finite.
        UnsupportedError: a DoRA, or a kind that does not fold exactly.
    """
    if not adapters:
        raise OptionError("no adapters to share")
    entrants = [entrant(name, one, scratch_folder) for name, one in adapters.items()]
    inputs = [MergeInput(one.adapter, 1.0, one.name) for one in entrants]
    modules = align(inputs, force_base=options.force_base, allow_missing=options.allow_missing)
    fleet = Fleet(entrants, modules, rule, compute, options)
    return _Share(fleet, rule, compute, scratch_folder, progress).run()


class _Share:
    """One run."""

    def __init__(
        self,
        fleet: Fleet,
        rule: RankRule,
        compute: ComputeOptions,
        scratch_folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self.fleet, self.rule, self.compute = fleet, rule, compute
        self.scratch = Scratch(scratch_folder)
        self._progress = progress
        rule.check_patterns(fleet.modules)
        if fleet.options.cores == "diagonal" and (rule.energy or rule.sv_fro):
            raise OptionError(
                "the energy rule holds for full cores only, and diagonal ones keep less",
                hint="Use `rank` or `budget`",
            )

    def run(self) -> Shared:
        found = self._survey()
        norms = found.squared_norms.sum(axis=1)
        for one, norm in zip(self.fleet.entrants, norms, strict=True):
            if not norm > 0.0:
                raise AdapterError(
                    "the adapter changes nothing: all its weight changes are zero",
                    path=one.source.source,
                    hint="Leave it out",
                )
        weights = self.fleet.weights(found.squared_norms, norms)
        groups = self._groups(found, weights)
        units = self.fleet.units(groups)
        record = self._record()
        ranks = self._chosen(units, weights, groups, record)
        fixed = fixed_ranks(self.rule, units, ranks)
        threads, squares = self.compute.threads, found.squared_norms
        others = found.around(len(groups))
        moved = reassigned(self.fleet, groups, others, fixed, weights, squares, threads)
        if moved != groups:
            groups, units = moved, self.fleet.units(moved)
            ranks = self._chosen(units, weights, groups, record)
        return self._shared(units, ranks, weights, groups, found.squared_norms, record)

    def _survey(self) -> Survey:
        several = self.fleet.options.clusters != 1 and len(self.fleet.entrants) > 1
        count = len(self.fleet.modules)

        def tell(done: int) -> None:
            if self._progress is not None:
                self._progress(done, 2 * count)

        names = list(self.fleet.modules)
        threads = self.compute.threads
        return survey(names, self.fleet.loaded, threads, with_overlaps=several, progress=tell)

    def _groups(self, found: Survey, weights: Array) -> list[list[int]]:
        """Return the groups asked for, or those that take the fewest bytes on some modules."""
        total = len(self.fleet.entrants)
        if self.fleet.options.clusters is not None:
            return found.groups(min(self.fleet.options.clusters, total))
        counts = [1 << power for power in range(total.bit_length()) if 1 << power < total]
        spread = np.linspace(0, len(self.fleet.modules) - 1, min(_SAMPLED, len(self.fleet.modules)))
        names = [list(self.fleet.modules)[int(place)] for place in dict.fromkeys(np.rint(spread))]
        share = sum(sum(self.fleet.modules[n].first.shape) for n in names) / sum(
            sum(module.first.shape) for module in self.fleet.modules.values()
        )

        def cost(groups: Sequence[Sequence[int]]) -> float:
            def one(unit: Unit) -> Spectrum:
                return self.fleet.spectrum(unit, self.fleet.joints(unit, weights)[1], energies=True)

            units = self.fleet.units(groups, names)
            return self._cost(list(in_order(one, units, self.compute.threads)), share)

        tried = [found.groups(count) for count in [*counts, total]]
        return min(tried, key=cost) if total > 1 else tried[0]

    def _cost(self, spectra: Sequence[Spectrum], share: float) -> float:
        """Return what groups cost: bytes that keep enough, or what a budget's part would lose."""
        if self.rule.budget is None:
            rule = RankRule(energy=self.rule.energy or (self.rule.sv_fro or 0.0) ** 2 or _KEPT)
            return float(sum(each.nbytes(rule.of_module(each)) for each in spectra))
        by_name = {each.name: each for each in spectra}
        limit = Limit(
            int(share * self.rule.budget.resolve(self.fleet.bytes_in)),
            lambda ranks: sum(by_name[name].nbytes(rank) for name, rank in ranks.items()),
        )
        try:
            ranks = choose_ranks(spectra, RankRule(budget=self.rule.budget), limit=limit)
        except OptionError:  # rank 1 for each of so many groups takes more
            return float("inf")
        return -sum(float(each.energies[: ranks[each.name]].sum()) for each in spectra)

    def _chosen(
        self,
        units: Sequence[Unit],
        weights: Array,
        groups: Sequence[Sequence[int]],
        record: Mapping[str, Any],
    ) -> dict[str, int] | None:
        """Return the ranks that depend on several units, None if none does."""
        if not self.rule.needs_all_spectra:
            return None

        def one(unit: Unit) -> Spectrum:
            return self.fleet.spectrum(unit, self.fleet.joints(unit, weights)[1])

        spectra = list(in_order(one, units, self.compute.threads))
        limit = None
        if self.rule.budget is not None:
            nbytes = self.rule.budget.resolve(self.fleet.bytes_in)
            planned = self._planned_size(units, groups, record)
            limit = Limit(nbytes, planned)
        return choose_ranks(spectra, self.rule, limit=limit)

    def _planned_size(
        self, units: Sequence[Unit], groups: Sequence[Sequence[int]], record: Mapping[str, Any]
    ) -> Callable[[Mapping[str, int]], int]:
        """Return a function from ranks to the size of the file that they give."""

        def size(ranks: Mapping[str, int]) -> int:
            parts = {unit.name: self.fleet.planned(unit, ranks[unit.name]) for unit in units}
            whole = self._set(units, parts, groups, np.ones(len(self.fleet.entrants)))
            made_of = with_record(metadata_of(whole), record_metadata(record))
            return safetensors_nbytes(tensors_of(whole), made_of)

        return size

    def _set(
        self,
        units: Sequence[Unit],
        parts: Mapping[str, Part],
        groups: Sequence[Sequence[int]],
        errors: Array,
    ) -> SharedSet:
        modules: dict[str, SharedModule] = {}
        for unit in units:
            name, layer = unit.module.name, unit.module.first.layer
            before = modules[name].parts if name in modules else {}
            modules[name] = SharedModule(name, layer, {**before, unit.group: parts[unit.name]})
        group_of = {i: number for number, members in enumerate(groups) for i in members}
        members = tuple(
            member_of(one, group_of[i], float(errors[i]), self.scratch)
            for i, one in enumerate(self.fleet.entrants)
        )
        bases = [one.adapter.base_model for one in self.fleet.entrants]
        base = next((name for name in bases if name is not None), None)
        return SharedSet(self.fleet.options.cores == "diagonal", base, members, modules)

    def _record(self) -> dict[str, Any]:
        inputs = {f"{place}": one.source for place, one in enumerate(self.fleet.entrants)}
        values = {
            **self.fleet.options.record(),
            "rule": as_options(self.rule),
            **({} if self.compute.dtype is None else {"dtype": self.compute.dtype}),
        }
        return operation_record("fleet-share", inputs, values)

    def _shared(
        self,
        units: Sequence[Unit],
        ranks: Mapping[str, int] | None,
        weights: Array,
        groups: Sequence[Sequence[int]],
        squares: Array,
        record: Mapping[str, Any],
    ) -> Shared:
        alone, entrants = Alone(), self.fleet.entrants

        def one(unit: Unit) -> tuple[Unit, Made, int, list[list[Triplets]], Array]:
            loaded, joints, own = self.fleet.joints(unit, weights)
            spectrum = self.fleet.spectrum(unit, joints)
            rank = self.rule.of_module(spectrum) if ranks is None else ranks[unit.name]
            found = made(
                unit.module.name,
                loaded,
                joints,
                rank,
                unit.members,
                cores=self.fleet.options.cores,
                dtype=self.fleet.dtype,
                is_stack=unit.is_stack,
                scratch=self.scratch,
            )
            return unit, found, spectrum.rank, [*map(_values_only, loaded)], own

        parts: dict[str, Part] = {}
        reports = []
        errors = np.zeros(squares.shape)
        results = in_order(one, units, self.compute.threads)
        for done, (unit, found, most, loaded, own) in enumerate(results, 1):
            column = self.fleet.columns[unit.module.name]
            parts[unit.name] = found.part
            errors[list(unit.members), column] = found.squared_errors
            price = sum(unit.module.first.shape) * self.fleet.dtype.bits // 8
            for i, matrices, weight in zip(unit.members, loaded, own, strict=True):
                for values in matrices:
                    alone.add(i, values.s, float(weight), price)
            reports.append(self._report(unit, found, most, squares[:, column]))
            if self._progress is not None:
                count = len(self.fleet.modules)
                self._progress(count + done * count // len(units), 2 * count)
        norms = squares.sum(axis=1)
        whole = self._set(units, parts, groups, np.sqrt(errors.sum(axis=1) / norms))
        nbytes = sum(t.nbytes for p in parts.values() for t in (p.u, p.v, p.cores))
        lost_alone = alone.squared_errors(len(self.fleet.entrants), nbytes)
        inputs = tuple(file for one in entrants for file in one.source.inputs)
        adapter = as_shelf(whole, record, inputs)
        return Shared(
            adapter=adapter,
            relative_error=total(errors, norms),
            alone_error=total(lost_alone, norms),
            bytes_in=self.fleet.bytes_in,
            bytes_out=safetensors_nbytes(adapter.carried.values(), adapter.metadata),
            groups=len(groups),
            adapters=tuple(
                SharedAdapter(
                    member.name,
                    member.group,
                    one.source.weights_nbytes,
                    total(errors[i], norms[i]),
                    total(lost_alone[i], norms[i]),
                )
                for i, (member, one) in enumerate(
                    zip(whole.members, self.fleet.entrants, strict=True)
                )
            ),
            modules=tuple(reports),
            findings=self._findings(groups, errors, lost_alone),
        )

    def _report(self, unit: Unit, found: Made, most: int, squares: Array) -> SharedModuleReport:
        names = [self.fleet.entrants[i].name for i in unit.members]
        own = [float(squares[i]) for i in unit.members]
        pairs = zip(names, found.squared_errors, own, strict=True)
        return SharedModuleReport(
            name=unit.module.name,
            group=unit.group,
            rank_in=most,
            rank_out=found.part.rank,
            relative_error=total(found.squared_errors, own),
            errors={name: total([error], [norm]) for name, error, norm in pairs},
        )

    def _findings(
        self, groups: Sequence[Sequence[int]], errors: Array, lost_alone: Array
    ) -> tuple[Finding, ...]:
        notices = dict.fromkeys(each for one in self.fleet.entrants for each in one.source.notices)
        found = [*notices, *left_beside(self.fleet.entrants)]
        apart = sum(len(members) == 1 for members in groups)
        if apart and len(self.fleet.entrants) > 1:
            message = (
                f"{apart} of {len(self.fleet.entrants)} adapters share no basis, which would take "
                "more bytes than it spares; `clusters=1` shares all the same"
            )
            found.append(Finding("shared-alone", "warning", None, message))
        if lost_alone.sum() < errors.sum() and len(self.fleet.entrants) > 1:
            message = "squeezing each adapter alone to the same size may lose less"
            found.append(Finding("alone-is-better", "warning", None, message))
        return tuple(found)


def as_shelf(whole: SharedSet, record: Mapping[str, Any], inputs: tuple[Any, ...]) -> Adapter:
    """Return a set as an adapter that can be written.

    Args:
        whole: the set.
        record: how it was made.
        inputs: the files that it was made from.
    """
    shelf = Adapter(
        format=FORMAT,
        source=None,
        modules={},
        carried={tensor.key: tensor for tensor in tensors_of(whole)},
        metadata=with_record(metadata_of(whole), record_metadata(record)),
        base_model=whole.base_model,
        inputs=inputs,
        provenance=record,
    )
    return replace(shelf, findings=findings_of(whole, shelf))


def _values_only(matrices: Sequence[Triplets]) -> list[Triplets]:
    """Return triplets without their vectors, which nobody needs any more."""
    nothing = np.zeros((0, 0))
    return [Triplets(nothing, one.s, nothing) for one in matrices]
