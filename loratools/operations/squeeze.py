"""Rank compression: the best approximation of each ΔW by one of lower rank, in factor space.

What it does: decompose every ΔW exactly from its factors, choose ranks, write canonical factors
(σ split √σ·√σ, sorted, signs fixed, scale 1), and state the error that the written, rounded
factors have. Source of the idea: LoRA-Squeeze, arXiv 2602.10993; optimality: Eckart–Young.

With second moments of the inputs, it makes ‖(ΔW − ΔW')·X‖ least in place of ‖ΔW − ΔW'‖
(`algebra.calibrated`), and ranks are chosen by the singular values of ΔW·X.

What it does not: look at the base model. The error of a DoRA is that of its direction;
its magnitudes are kept, and the norm is taken again when the adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loratools.algebra.budget import RankChoice
from loratools.algebra.calibrated import Calibrated
from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Decomposed
from loratools.algebra.ranks import RankRule, as_options
from loratools.folding.undecomposed import Apart, is_apart, matrices_of
from loratools.folding.without_base import folded_where_exact, to_lora_command
from loratools.lowrank.matrices import calibrated, loaded, matrices
from loratools.lowrank.moments import Moments
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions, Resizer, Scaling, spectrum_of
from loratools.operations.common_alpha import common_alpha
from loratools.operations.one_rank import groups_of_one_rank
from loratools.operations.ranked import Measured, Outcome, Ranked, share
from loratools.operations.reported import ratio
from loratools.work.provenance import InputFile, operation_record
from loratools.work.requests import Progress
from loratools.work.scratch import Scratch
from loratools.work.selection import Selection, require_selected
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.disk.errors import OptionError, UnsupportedError


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        name: module path.
        rank_in: rank before.
        rank_out: rank after.
        energy: share of ‖ΔW‖²_F in the singular values kept.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the stored, rounded factors.
        calibrated_error: ‖(ΔW − ΔW')·X‖/‖ΔW·X‖ for the inputs whose moments were given; None
            without.
    """

    name: str
    rank_in: int
    rank_out: int
    energy: float
    relative_error: float
    calibrated_error: float | None = None


@dataclass(frozen=True)
class SqueezeResult:
    """The squeezed adapter, not yet written, and the error it has.

    Attributes:
        adapter: to be given to `write_adapter`.
        modules: one report each, in path order.
        relative_error: over all these modules together.
        directional: True if modules are DoRA, whose error is that of the direction.
        kept_whole: modules without factors, which keep every bit: full differences, and modules
            that are not selected.
        calibrated_error: over the selected modules together, for the inputs whose moments were
            given; None without.
    """

    adapter: Adapter
    modules: tuple[ModuleReport, ...]
    relative_error: float
    directional: bool
    kept_whole: tuple[str, ...] = ()
    calibrated_error: float | None = None


def squeeze(
    adapter: Adapter,
    rule: RankRule,
    options: ComputeOptions | None = None,
    selection: Selection | None = None,
    *,
    moments: Moments | None = None,
    scaling: Scaling | None = None,
    nbytes_of: Callable[[Adapter], int] | None = None,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> SqueezeResult:
    """Compress an adapter's ranks.

    Args:
        adapter: any adapter whose ΔW is known, and that has factors or folds into them.
        rule: how ranks are chosen.
        options: how to compute and store.
        selection: modules to touch; the others keep every bit.
        moments: second moments of the modules' inputs, for which the error is to be least.
        scaling: the scale of each module's new factors; by default the options decide.
        nbytes_of: what an adapter weighs that must keep a budget; by default its weight file.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        UnsupportedError: the factors do not tell the true ΔW.
        AdapterError: nothing to squeeze, NaN or infinite values, or values beyond the dtype.
        OptionError: options contradict each other, or the budget is too small.
    """
    options, selection = options or ComputeOptions(), selection or Selection()
    work = _Squeeze(adapter, rule, options, selection, scratch_folder, moments, scaling, nbytes_of)
    rule.check_patterns(work.chosen)
    if rule.uniform and len(work.chosen) < len(work.names):
        raise OptionError("`uniform` changes all modules, and some are not selected")
    if rule.uniform and options.keep_alpha and len(work.alphas()) > 1:
        raise OptionError(
            "`uniform` needs one scale, and `keep_alpha` keeps several",
            got=", ".join(f"{alpha:g}" for alpha in sorted(work.alphas())),
            hint="Leave out `keep_alpha` or `uniform`",
        )
    record = {"rule": as_options(rule), **options.record(), **selection.record()}
    inputs = {"adapter": work.source}
    others = [] if moments is None else [_as_input(moments)]
    made = partial(operation_record, "squeeze", inputs, record, others=others)
    done = work.run(made, progress)
    modules = done.modules
    if all(outcome.unchanged for outcome in done.outcomes) and (
        not rule.uniform or len(work.scales()) == 1
    ):
        modules = dict(work.whole)
    finished = work.finished(modules, done.record)
    if rule.uniform and finished.config.get("use_rslora"):
        # One scale for every loader, and not all of them know α/√r; the writer finds α anew.
        finished = replace(finished, config={**finished.config, "use_rslora": False})
    return SqueezeResult(
        adapter=finished,
        modules=tuple(outcome.report for outcome in done.outcomes),
        relative_error=done.relative_error,
        directional=any(change.is_dora for change in modules.values()),
        kept_whole=tuple(work.kept_whole),
        calibrated_error=None if moments is None else _calibrated_error(done.outcomes),
    )


def _as_input(moments: Moments) -> InputFile:
    file = moments.file.file
    return InputFile("stats", file.path, {"sha256": file.sha256()})


def _calibrated_error(outcomes: Sequence[_Squeezed]) -> float:
    squared_error = sum(outcome.squared_output_error for outcome in outcomes)
    return ratio(squared_error, sum(outcome.squared_output for outcome in outcomes))


def rank_choices(
    adapter: Adapter, options: ComputeOptions | None = None, selection: Selection | None = None
) -> list[RankChoice]:
    """Return the table rank → size → error of an adapter, writing nothing.

    Raises:
        UnsupportedError: the factors do not tell the true ΔW.
        AdapterError: nothing to squeeze, or NaN or infinite values.
    """
    options, selection = options or ComputeOptions(), selection or Selection()
    work = _Squeeze(adapter, RankRule(), options, selection, None)
    others = [name for name in work.names if name not in work.chosen]
    energy = sum(work.outcome(name, None).squared_norm for name in others)
    return work.table(list(work.measurements()), energy)


def _folded(adapter: Adapter, selection: Selection, scratch_folder: Path | None) -> Adapter:
    """Convert the selected modules to low-rank factors where that is cheap.

    In formats whose configuration names one kind for the whole file, convert the others as well.
    """
    selected = {name for name in adapter.modules if name in selection}
    if get_format(adapter.format).one_kind:
        adapter = folded_where_exact(adapter, "squeeze", scratch_folder, leave=selected)
    others = set(adapter.modules) - selected
    return folded_where_exact(adapter, "squeeze", scratch_folder, leave=others, dense=False)


def _kept_whole(adapter: Adapter, selection: Selection) -> dict[str, ModuleChange]:
    """Return the modules without factors that stay as they are.

    Raises:
        UnsupportedError: a selected one has no change that can be told without the base, or
            nothing else is selected.
    """
    found = {
        name: delta
        for name, delta in adapter.modules.items()
        if delta.factors is None and not (name in selection and is_apart(delta))
    }
    for name, delta in found.items():
        if name in selection and (delta.kind != "full" or delta.is_dora):
            raise UnsupportedError(
                f"a weight change of kind {delta.kind} has no factors that squeeze could use",
                path=adapter.source,
                tensor=name,
                hint=f"Make it a plain LoRA first: {to_lora_command(adapter, delta)}; "
                "or leave it out with `exclude`",
            )
    whole = [delta for name, delta in found.items() if name in selection]
    if whole and len(found) == len(adapter.modules):
        raise UnsupportedError(
            "full differences stay whole, and there is nothing else to squeeze",
            path=adapter.source,
            hint=f"Make them a plain LoRA first: {to_lora_command(adapter, whole[0])}",
        )
    return found


def _selected(
    adapter: Adapter, modules: Mapping[str, ModuleChange], selection: Selection
) -> list[str]:
    adapter.require_true_delta("squeeze")
    require_selected(selection, modules, "squeeze", adapter.source)
    return [name for name in modules if name in selection]


@dataclass(frozen=True)
class _Squeezed(Outcome):
    report: ModuleReport
    unchanged: bool
    squared_output_error: float = 0.0
    squared_output: float = 0.0


class _Squeeze(Ranked[_Squeezed, Measured]):
    """One run: what all its modules share.

    Attributes:
        source: the adapter, its selected modules with factors where that is cheap.
        kept_whole: modules without factors that stay as they are.
        whole: the others.
    """

    def __init__(
        self,
        adapter: Adapter,
        rule: RankRule,
        options: ComputeOptions,
        selection: Selection,
        scratch_folder: Path | None,
        moments: Moments | None = None,
        scaling: Scaling | None = None,
        nbytes_of: Callable[[Adapter], int] | None = None,
    ) -> None:
        self._moments = moments
        self.source = _folded(adapter, selection, scratch_folder)
        self.kept_whole = _kept_whole(self.source, selection)
        every = self.source.modules.items()
        self.whole = {name: change for name, change in every if name not in self.kept_whole}
        self._apart = {
            name: Apart(name, delta)
            for name, change in self.whole.items()
            if (delta := change.kind_delta) is not None
        }
        self._like = {
            name: self._apart[name].planned()
            if name in self._apart
            else PlannedFactors.like(change.require_factors())
            for name, change in self.whole.items()
        }
        layers = {name: change.layer for name, change in self.whole.items()}
        groups = groups_of_one_rank(layers, self.source.format)
        self._group = {name: group for group in groups for name in group}
        self._device = Device(options.device)
        chosen = _selected(self.source, self.whole, selection)
        kept = len(chosen) < len(self.whole)
        alike = common_alpha(self.source.format, self._like, rule, options, kept=kept)
        super().__init__(
            list(self.whole),
            rule,
            Resizer(options, Scratch(scratch_folder), rule.uniform, scaling or alike),
            input_nbytes=self.source.weights_nbytes,
            source=self.source.source,
            chosen=chosen,
            groups=groups,
            nbytes_of=nbytes_of,
        )
        self._selected = frozenset(self.chosen)
        if moments is not None:
            self._check_moments(moments)

    def alphas(self) -> set[float]:
        """Return the numbers that files state as alpha."""
        return {like.alpha for like in self._like.values() if like.alpha is not None}

    def scales(self) -> set[float]:
        """Return the numbers that multiply the factors."""
        return {like.scale for like in self._like.values()}

    def _check_moments(self, moments: Moments) -> None:
        for name in self.chosen:
            if name in self._apart:
                raise UnsupportedError(
                    "a change without factors cannot be calibrated",
                    path=self.source.source,
                    tensor=name,
                    hint="Make it a plain LoRA first: "
                    f"{to_lora_command(self.source, self.whole[name])}",
                )
            moments.check(name, self.whole[name].require_factors())

    def _parts(self, name: str) -> Sequence[Decomposed]:
        """Return every matrix of a module, calibrated if moments are given."""
        whole = self.whole[name]
        if self._moments is None:
            return matrices_of(whole, self._apart.get(name), self._device)
        factors = whole.require_factors()
        return calibrated(factors, self._moments.of(name, factors.experts), self._device)

    def measured(self, name: str) -> Measured:
        like = self._like[name]
        return Measured(spectrum_of(name, like, self._parts(name), self.options), like)

    def changed(self, name: str, factors: LowRank) -> ModuleChange:
        return self.whole[name].with_direction(factors)

    def keeps_scale(self, name: str, ranks: Mapping[str, int]) -> bool:
        """Return whether no module that must have the same scale gets another rank."""
        group = self._group.get(name, ())
        return all(ranks[each] == self._like[each].rank for each in group if each in ranks)

    def adapter(self, modules: Mapping[str, ModuleChange]) -> Adapter:
        everything = {**self.whole, **modules, **self.kept_whole}
        return replace(
            self.source, modules={name: everything[name] for name in self.source.modules}
        )

    def outcome(self, name: str, ranks: Mapping[str, int] | None) -> _Squeezed:
        whole, like = self.whole[name], self._like[name]
        if name not in self._selected:
            found = matrices(whole.require_factors(), self._device)
            squared_norm = sum(matrix.squared_norm for matrix in found)
            report = ModuleReport(name, like.rank, like.rank, 1.0, 0.0)
            return _Squeezed(name, whole, 0.0, squared_norm, report, unchanged=True)
        parts = self._parts(name)
        spectrum = spectrum_of(name, like, parts, self.options)
        rank = self.rule.of_module(spectrum) if ranks is None else ranks[name]
        squared_error, kept = 0.0, sum(part.squared_norm for part in parts)
        squared_norm = kept
        new = None
        if name not in self._apart:
            keeps = ranks is None or self.keeps_scale(name, ranks)
            new = self.resizer.without_loss(whole.require_factors(), rank, keep_scale=keeps)
        unchanged = new is not None and (new.rank, new.a.dtype, new.b.dtype) == (
            like.rank,
            like.a.dtype,
            like.b.dtype,
        )
        if new is None:
            compressed = self.resizer.compressed(name, like, parts, rank)
            new, squared_error, kept = compressed.delta, compressed.squared_error, compressed.energy
        error = ratio(squared_error, squared_norm)
        on_inputs, output = _output_error(parts, new)
        report = ModuleReport(
            name,
            like.rank,
            new.rank,
            share(kept, squared_norm),
            error,
            None if self._moments is None else ratio(on_inputs, output),
        )
        change = self.changed(name, new)
        return _Squeezed(
            name, change, squared_error, squared_norm, report, unchanged, on_inputs, output
        )


def _output_error(parts: Sequence[Decomposed], new: LowRank) -> tuple[float, float]:
    """Return ‖(ΔW − ΔW')·X‖² and ‖ΔW·X‖² of a calibrated module; zeros of another."""
    squared_error = squared = 0.0
    for part, (b, a) in zip(parts, loaded(new), strict=True):
        if isinstance(part, Calibrated):
            squared_error += part.squared_output_error(new.scale * b, a)
            squared += part.squared_output
    return squared_error, squared
