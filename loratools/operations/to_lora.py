"""Every kind of adapter as plain low-rank factors, at the smallest error that is possible.

There are three cases. A kind whose change is a product of two factors is converted exactly, up to
rounding. Any other change is approximated by its leading singular triplets, and the error of the
stored factors is measured against the true change. A change that depends on the base weight (DoRA,
OFT, IA³ …) is built from it a block of rows at a time. What the kinds mean is in `loratools.kinds`.

A DoRA changes W by g⊙(W + ΔW) − W with g = m/‖W + ΔW‖ per output: the rescaled factors, of low
rank, and diag(g − 1)·W, which is not. Both energies are reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from loratools.algebra.budget import RankChoice
from loratools.algebra.one_matrix import padded
from loratools.algebra.ranks import RankRule, as_options
from loratools.algebra.streamed_svd import StreamedMatrix
from loratools.folding.dora import Rescaling
from loratools.folding.module import stored_as_is
from loratools.folding.regenerate import regenerated
from loratools.folding.with_base import Opened, Opener
from loratools.folding.without_base import folds_alone, needs_base, plain_adapter, with_settings
from loratools.kinds import get_kind
from loratools.kinds.declaration import Product
from loratools.lowrank.matrices import loaded
from loratools.lowrank.resize import ComputeOptions, Resizer
from loratools.operations.common_alpha import common_alpha
from loratools.operations.in_class_names import renamed_to_class
from loratools.operations.one_rank import groups_of_one_rank
from loratools.operations.ranked import Measured, Outcome, Ranked, share
from loratools.operations.reported import ratio
from loratools.work.declared import option
from loratools.work.provenance import operation_record
from loratools.work.requests import Progress
from loratools.work.scratch import Scratch
from loratools.work.spellings import key_value
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import KindDelta, LowRank, ModuleChange
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.peft_facts import refused_modules
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError, and_more


@dataclass(frozen=True)
class ToLoraOptions:
    """Options of folding, besides ranks and options of computing.

    Attributes:
        set_: a value that the change depends on, and that neither the file nor the base's
            config.json holds.
        exact: keep changes that are not of low rank whole, as full differences, where the format
            has them.
    """

    set_: tuple[tuple[str, str], ...] = option(
        (), heading="Input", metavar="KEY=VALUE", parse=key_value
    )
    exact: bool = option(False, heading="Rank")


@dataclass(frozen=True)
class ToLoraModuleReport:
    """What became of one module.

    Attributes:
        name: module path.
        kind: what it was.
        rank: of the factors; None if it is kept whole.
        energy: share of ‖ΔW‖²_F in the singular values kept.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the stored, rounded factors.
        low_rank_energy: of a DoRA, ‖g⊙scale·BA‖²/‖ΔW‖²; None of others.
        rescaling_energy: of a DoRA, ‖diag(g − 1)W‖²/‖ΔW‖²; None of others. The two overlap, so
            they need not add up to 1.
    """

    name: str
    kind: str
    rank: int | None
    energy: float
    relative_error: float
    low_rank_energy: float | None = None
    rescaling_energy: float | None = None


@dataclass(frozen=True)
class ToLoraResult:
    """The plain adapter, not yet written.

    Attributes:
        adapter: to be given to `write_adapter`.
        modules: one report each, in path order.
        relative_error: over all modules together.
        cautions: what the user should know about the kinds that took part.
    """

    adapter: Adapter
    modules: tuple[ToLoraModuleReport, ...]
    relative_error: float
    cautions: tuple[str, ...]


@dataclass(frozen=True)
class ToLoraChoices:
    """What ranks would cost and lose, for an adapter whose change is not of low rank.

    Attributes:
        choices: rank → size → error, over all modules.
        low_rank_energy: of DoRA modules, share of their energy in the rescaled factors; None if
            there are none.
        rescaling_energy: of DoRA modules, share of their energy in diag(g − 1)W.
    """

    choices: tuple[RankChoice, ...]
    low_rank_energy: float | None
    rescaling_energy: float | None


def to_lora(
    adapter: Adapter,
    rule: RankRule,
    options: ComputeOptions | None = None,
    *,
    base: Checkpoint | None = None,
    given: Mapping[str, str] | None = None,
    whole: bool = False,
    record: Callable[[], Mapping[str, Any]] | None = None,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> ToLoraResult:
    """Turn an adapter of any kind into plain low-rank factors.

    Args:
        adapter: of any kind.
        rule: how ranks are chosen; without one, exact factors keep their rank, and a change that
            has none is refused.
        options: how to compute and store; new factors are float32 unless it says otherwise.
        base: the base model, for kinds that need it.
        given: settings that neither the file nor the base's configuration holds, by name.
        whole: keep changes that are not of low rank as full differences, where no rank is chosen.
        record: returns how the result is made; by default that it is made by to-lora.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        UnsupportedError: the change is not known, or not without the base.
        OptionError: no rule, where a change has no exact factors and is not to be kept whole.
        AdapterError: nothing to fold, NaN or infinite values, or tensors that do not fit.
    """
    complete = regenerated(adapter, base, given or {})
    adapter = with_settings(complete.adapter, complete.unused, base)
    adapter = adapter if base is None else renamed_to_class(adapter, base)
    work = _ToLora(adapter, rule, options or ComputeOptions(), base, scratch_folder, whole=whole)
    rule.check_patterns(adapter.modules)

    def recorded() -> dict[str, Any]:
        made = {"rule": as_options(rule), **work.options.record(), "seed": work.options.seed}
        made |= {"settings": dict(given)} if given else {}
        return operation_record("to-lora", {"adapter": adapter}, made, base)

    done = work.run(recorded if record is None else record, progress)
    return ToLoraResult(
        work.finished(done.modules, done.record),
        tuple(outcome.report for outcome in done.outcomes),
        done.relative_error,
        (
            *((complete.caution,) if complete.caution else ()),
            *_cautions(adapter),
            *(told.message for told in adapter.findings if told.code == "not-in-base"),
            *_of_fused(work.opener.fused),
            *_of_refused(adapter, base),
        ),
    )


def _of_refused(adapter: Adapter, base: Checkpoint | None) -> Iterator[str]:
    if base is None or adapter.format != "peft":
        return
    kind = base.config.get("model_type")
    layers = [name for name, each in adapter.modules.items() if not each.layer.parameters]
    refused = refused_modules(kind, layers)
    if refused:
        yield (
            f"PEFT refuses a LoRA of {and_more(refused)} in a model of type {kind}; fusing puts it "
            "there"
        )


def _of_fused(modules: Sequence[str]) -> Iterator[str]:
    if modules:
        yield (
            f"the base has {len(modules)} of the modules in one tensor with others, such as "
            f"{modules[0]}; fusing puts them there, PEFT does not load them on it"
        )


def _cautions(adapter: Adapter) -> tuple[str, ...]:
    kinds = {d.kind for d in adapter.modules.values() if d.factors is None}
    return tuple(get_kind(kind).caution for kind in sorted(kinds) if get_kind(kind).caution)


def to_lora_choices(
    adapter: Adapter,
    options: ComputeOptions | None = None,
    *,
    base: Checkpoint | None = None,
    given: Mapping[str, str] | None = None,
) -> ToLoraChoices | None:
    """Return what ranks would cost and lose, None if every module folds exactly.

    Raises:
        UnsupportedError: the change is not known, or not without the base.
        AdapterError: nothing to fold, NaN or infinite values, or tensors that do not fit.
    """
    complete = regenerated(adapter, base, given or {})
    adapter = with_settings(complete.adapter, complete.unused, base)
    work = _ToLora(adapter, RankRule(), options or ComputeOptions(), base, None, whole=False)
    deltas = adapter.modules.values()
    if all(d.kind == "lora" or (folds_alone(d) and not needs_base(d)) for d in deltas):
        return None
    found = list(work.measurements())
    if all(each.is_exact for each in found):
        return None
    rescalings = [each.rescaling for each in found if each.rescaling is not None]
    total = sum(rescaling.squared_norm for rescaling in rescalings) or 1.0
    return ToLoraChoices(
        tuple(work.table(found)),
        sum(r.squared_low_rank for r in rescalings) / total if rescalings else None,
        sum(r.squared_rescaling for r in rescalings) / total if rescalings else None,
    )


@dataclass(frozen=True)
class _Converted(Outcome):
    report: ToLoraModuleReport


@dataclass(frozen=True)
class _Measured(Measured):
    """A module's spectrum, a DoRA's rescaling, and whether exact factors exist."""

    rescaling: Rescaling | None
    is_exact: bool


class _ToLora(Ranked[_Converted, _Measured]):
    """One run: what all its modules share."""

    def __init__(
        self,
        adapter: Adapter,
        rule: RankRule,
        options: ComputeOptions,
        base: Checkpoint | None,
        scratch_folder: Path | None,
        *,
        whole: bool,
    ) -> None:
        adapter.require_true_delta("to-lora")
        if not adapter.modules:
            raise AdapterError("no module to convert", path=adapter.source)
        self.modules = adapter.modules
        self.whole = whole
        self.opener = Opener(adapter, rule, options, base)
        if base is not None:
            self.opener.refuse_tied(base)
        self._plain = plain_adapter(adapter, {})
        layers = {name: change.layer for name, change in adapter.modules.items()}
        parts = {name: change.factors for name, change in adapter.modules.items()}
        alike = common_alpha(self._plain.format, parts, rule, options)
        super().__init__(
            list(adapter.modules),
            rule,
            Resizer(options, Scratch(scratch_folder), rule.uniform, alike),
            input_nbytes=adapter.weights_nbytes,
            source=adapter.source,
            groups=groups_of_one_rank(layers, self._plain.format),
        )

    def adapter(self, modules: Mapping[str, ModuleChange]) -> Adapter:
        return replace(self._plain, modules=dict(modules))

    def measured(self, name: str) -> _Measured:
        opened = self.opener.open(name)
        spectrum = self.opener.spectrum(name, opened)
        return _Measured(spectrum, opened.planned, opened.rescaling, opened.exact is not None)

    def outcome(self, name: str, ranks: Mapping[str, int] | None) -> _Converted:
        with np.errstate(over="ignore", invalid="ignore"):  # refused by name where it matters
            return self._folded(name, self.opener.open(name), ranks)

    def _folded(self, name: str, opened: Opened, ranks: Mapping[str, int] | None) -> _Converted:
        squared_norm = sum(part.squared_norm for part in opened.matrices)
        rank = self._rank(name, opened, ranks)
        whole = self.modules[name]
        squared_error, kept = 0.0, squared_norm
        exact = opened.exact
        new: LowRank | KindDelta | None = None
        if whole.kind == "lora":
            part = whole.require_factors()
            new = self.resizer.without_loss(part, part.rank if rank is None else rank)
        elif exact is not None and (rank is None or rank >= len(exact.a)):
            exact = Product(*padded(exact.b, exact.a, rank or 0))
            new = stored_as_is(opened.planned, exact, self.options, self.resizer.scratch)
            squared_error = sum(
                part.squared_error(new.scale * b.astype(np.float64), a.astype(np.float64))
                for part, (b, a) in zip(opened.matrices, loaded(new), strict=True)
            )
        elif rank is None:
            new, squared_error = self._kept_whole(name, opened)
        if new is None:
            rank = opened.planned.rank if rank is None else rank
            found = self.resizer.compressed(name, opened.planned, opened.matrices, rank)
            new, squared_error, kept = found.delta, found.squared_error, found.energy
        of = opened.rescaling
        total = (of.squared_norm if of is not None else 0.0) or 1.0
        report = ToLoraModuleReport(
            name,
            opened.kind,
            None if isinstance(new, KindDelta) else new.rank,
            share(kept, squared_norm),
            ratio(squared_error, squared_norm),
            None if of is None else of.squared_low_rank / total,
            None if of is None else of.squared_rescaling / total,
        )
        return _Converted(name, ModuleChange(new), squared_error, squared_norm, report)

    def _kept_whole(self, name: str, opened: Opened) -> tuple[KindDelta, float]:
        """Return a change as a full difference in float32, and the squared error of rounding it."""
        part = opened.matrices[0]
        planned = opened.planned
        is_matrix = len(opened.matrices) == 1 and planned.layer.kind != "embedding"
        if not is_matrix or not isinstance(part, StreamedMatrix):
            raise UnsupportedError("a change of this layout cannot be kept whole", tensor=name)
        out, in_ = planned.shape
        values, squared_error = np.empty((out, in_), np.float32), 0.0
        for start, stop, block in part.blocks():
            values[start:stop] = block
            squared_error += float(np.sum((values[start:stop] - block) ** 2))
        kernel = planned.layer.kernel
        shape = (out, in_ // math.prod(kernel), *kernel) if kernel else (out, in_)
        diff = self.resizer.scratch.store(f"{name}.diff", values.reshape(shape), DTYPES["F32"])
        settings = {"scale": 1.0}
        delta = KindDelta("full", {"diff": diff}, settings, planned.layer, (out, in_))
        return delta, squared_error

    def _rank(self, name: str, opened: Opened, ranks: Mapping[str, int] | None) -> int | None:
        """Return the rank to give, None to keep what there is."""
        if ranks is not None:
            return ranks[name]
        has_own = opened.exact is not None or self.modules[name].kind == "lora"
        if self.rule.is_given and (has_own or self.rule.decides(name)):
            return self.rule.of_module(self.opener.spectrum(name, opened))
        if not has_own and not self.whole:
            raise OptionError(
                f"a weight change of kind {opened.kind} is not of low rank",
                hint="Choose a rank with `rank`, `energy`, `budget` or another rule",
            )
        return None
