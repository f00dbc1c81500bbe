"""Rank compression: the best approximation of each ΔW by one of lower rank, in factor space.

What it does: decompose every ΔW exactly from its factors, choose ranks, write canonical factors
(σ split √σ·√σ, sorted, signs fixed, scale 1), and state the error that the written, rounded
factors have. Source of the idea: LoRA-Squeeze, arXiv 2602.10993; optimality: Eckart–Young.

What it does not: look at the base model or at data. The error of a DoRA is that of its direction;
its magnitudes are kept, and the norm is taken again when the adapter is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.algebra.budget import RankChoice, choose_ranks, rank_table
from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Decomposed
from loratools.algebra.ranks import RankRule, Spectrum, as_options
from loratools.folding.undecomposed import Apart, is_apart, parts_of
from loratools.folding.without_base import folded_where_exact, to_lora_command
from loratools.lowrank.matrices import matrices
from loratools.lowrank.resize import ComputeOptions, Resizer, spectrum_of
from loratools.work.parallel import in_order
from loratools.work.provenance import operation_record, record_metadata
from loratools.work.scratch import Scratch
from loratools.work.selection import Selection
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter, ModuleChange
from loratools_formats.disk.errors import (
    AdapterError,
    LoratoolsError,
    OptionError,
    UnsupportedError,
)

_PROVENANCE_BYTES = 1024  # more than a squeeze adds to the header, its options aside


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        name: module path.
        rank_in: rank before.
        rank_out: rank after.
        energy: share of ‖ΔW‖²_F in the singular values kept.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the stored, rounded factors.
    """

    name: str
    rank_in: int
    rank_out: int
    energy: float
    relative_error: float


@dataclass(frozen=True)
class SqueezeResult:
    """The squeezed adapter, not yet written, and the error it has.

    Attributes:
        adapter: to be given to `write_adapter`.
        modules: one report each, in path order.
        relative_error: over all these modules together.
        directional: True if modules are DoRA, whose error is that of the direction.
        kept_whole: modules without factors, which keep every bit: full differences, and what is
            not selected.
    """

    adapter: Adapter
    modules: tuple[ModuleReport, ...]
    relative_error: float
    directional: bool
    kept_whole: tuple[str, ...] = ()


def squeeze(
    adapter: Adapter,
    rule: RankRule,
    options: ComputeOptions | None = None,
    selection: Selection | None = None,
    *,
    scratch_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SqueezeResult:
    """Compress an adapter's ranks.

    Args:
        adapter: any adapter whose factors tell its true ΔW, or that folds into such factors.
        rule: how ranks are chosen.
        options: how to compute and store.
        selection: modules to touch; the others keep every bit.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        UnsupportedError: the factors do not tell the true ΔW.
        AdapterError: nothing to squeeze, NaN or infinite values, or values beyond the dtype.
        OptionError: options contradict each other, or the budget is too small.
    """
    options, selection = options or ComputeOptions(), selection or Selection()
    source = _folded(adapter, selection, scratch_folder)
    kept_whole = _kept_whole(source, selection)
    apart = _taken_apart(source, kept_whole)
    adapter = _as_templates(_without(source, kept_whole), apart)
    selected = _selected(adapter, selection)
    rule.check_patterns(selected)
    if rule.uniform and selected != set(adapter.modules):
        raise OptionError("uniform concerns all modules, and some are not selected")
    if rule.uniform and options.keep_alpha and len(_alphas(adapter)) > 1:
        raise OptionError(
            "uniform wants one scale, and keeping alpha keeps several",
            got=", ".join(f"{alpha:g}" for alpha in sorted(_alphas(adapter))),
            hint="Leave out `keep_alpha` or `uniform`",
        )
    record = {"rule": as_options(rule), **options.record(), **selection.record()}
    with ThreadPoolExecutor(1) as beside:
        # Digesting the input takes as long as reading it, so it runs beside the arithmetic.
        provenance = beside.submit(operation_record, "squeeze", {"adapter": adapter}, record)
        added = _PROVENANCE_BYTES + 2 * len(json.dumps(record)) + _nbytes(kept_whole)
        done = _all_squeezed(
            adapter, apart, selected, rule, options, added, scratch_folder, progress
        )
    modules = {outcome.report.name: outcome.delta for outcome in done}
    scales = {delta.require_factors().scale for delta in adapter.modules.values()}
    if all(outcome.unchanged for outcome in done) and (not rule.uniform or len(scales) == 1):
        modules = dict(adapter.modules)
    squeezed = replace(
        adapter,
        modules={name: {**modules, **kept_whole}[name] for name in source.modules},
        provenance=provenance.result(),
        metadata={**adapter.metadata, **record_metadata(provenance.result())},
    )
    _check_budget(squeezed, rule, adapter.weights_nbytes)
    return SqueezeResult(
        adapter=squeezed,
        modules=tuple(outcome.report for outcome in done),
        relative_error=_ratio(
            sum(outcome.squared_error for outcome in done),
            sum(outcome.squared_norm for outcome in done),
        ),
        directional=any(delta.is_dora for delta in modules.values()),
        kept_whole=tuple(kept_whole),
    )


def _folded(adapter: Adapter, selection: Selection, scratch_folder: Path | None) -> Adapter:
    """Return an adapter with factors where they are thin; what is not selected stays as it is.

    Files that hold one kind for all modules get factors of all that have them.
    """
    selected = {name for name in adapter.modules if name in selection}
    if get_format(adapter.format).one_kind:
        adapter = folded_where_exact(adapter, "squeeze", scratch_folder, leave=selected)
    others = set(adapter.modules) - selected
    return folded_where_exact(adapter, "squeeze", scratch_folder, leave=others, dense=False)


def _taken_apart(adapter: Adapter, kept_whole: Container[str]) -> dict[str, Apart]:
    return {
        name: Apart(name, delta)
        for name, change in adapter.modules.items()
        if (delta := change.kind_delta) is not None and name not in kept_whole
    }


def _as_templates(adapter: Adapter, apart: Mapping[str, Apart]) -> Adapter:
    templates = {name: ModuleChange(one.template()) for name, one in apart.items()}
    return replace(adapter, modules={**adapter.modules, **templates})


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


def _without(adapter: Adapter, names: Container[str]) -> Adapter:
    modules = {name: delta for name, delta in adapter.modules.items() if name not in names}
    return replace(adapter, modules=modules)


def _nbytes(modules: Mapping[str, ModuleChange]) -> int:
    """Return the bytes of modules in a file, their part of the header about."""
    tensors = [tensor for delta in modules.values() for tensor in delta.tensors()]
    return sum(tensor.nbytes + 128 + len(tensor.key) for tensor in tensors)


def _all_squeezed(
    adapter: Adapter,
    apart: Mapping[str, Apart],
    selected: set[str],
    rule: RankRule,
    options: ComputeOptions,
    header_nbytes: int,
    scratch_folder: Path | None,
    progress: Callable[[int, int], None] | None,
) -> list[_Outcome]:
    groups = _sharing_settings(adapter)
    ranks = None
    if rule.needs_all_spectra or groups:
        ranks = choose_ranks(
            _spectra(adapter, apart, selected, options),
            rule,
            input_nbytes=adapter.weights_nbytes,
            fixed_nbytes=_fixed_nbytes(adapter, selected) + header_nbytes,
        )
    grouped: set[str] = set()
    for group in groups:
        chosen = {name: rank for name, rank in (ranks or {}).items() if name in group}
        if any(
            rank != adapter.modules[name].require_factors().rank for name, rank in chosen.items()
        ):
            ranks = {**(ranks or {}), **dict.fromkeys(chosen, max(chosen.values()))}
            grouped |= set(chosen)
    resizer = Resizer(options, Scratch(scratch_folder), rule.uniform)
    device = Device(options.device)

    def one(name: str) -> _Outcome:
        try:
            whole = adapter.modules[name]
            if name not in selected:
                return _untouched(name, whole, device)
            rank = None if ranks is None else ranks[name]
            parts = parts_of(whole, apart.get(name), device)
            keep_scale = None if name in apart else name not in grouped
            return _squeezed(name, whole, parts, rule, rank, resizer, keep_scale)
        except LoratoolsError as error:
            if error.path is None and adapter.source is not None:
                error.path = str(adapter.source)
            raise

    done: list[_Outcome] = []
    for outcome in in_order(one, adapter.modules, options.threads):
        done.append(outcome)
        if progress is not None:
            progress(len(done), len(adapter.modules))
    return done


def _alphas(adapter: Adapter) -> set[float]:
    parts = [delta.require_factors() for delta in adapter.modules.values()]
    return {part.alpha for part in parts if part.alpha is not None}


def _sharing_settings(adapter: Adapter) -> list[list[str]]:
    """Return groups of modules that must have one rank and scale.

    PEFT names the settings of expert parameters by parameter, and a file does not say which of two
    adapted parameters of one module is which, so both need the same.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, delta in adapter.modules.items():
        parameters = delta.require_factors().layer.parameters
        if len(parameters) > 1:
            groups.setdefault(parameters, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def rank_choices(
    adapter: Adapter, options: ComputeOptions | None = None, selection: Selection | None = None
) -> list[RankChoice]:
    """Return the table rank → size → error of an adapter, writing nothing.

    Raises:
        UnsupportedError: the factors do not tell the true ΔW.
        AdapterError: nothing to squeeze, or NaN or infinite values.
    """
    options = options or ComputeOptions()
    selection = selection or Selection()
    source = _folded(adapter, selection, None)
    kept_whole = _kept_whole(source, selection)
    apart = _taken_apart(source, kept_whole)
    adapter = _as_templates(_without(source, kept_whole), apart)
    selected = _selected(adapter, selection)
    others = _spectra(adapter, apart, set(adapter.modules) - selected, options)
    other_energy = sum(float(spectrum.energies.sum()) for spectrum in others)
    spectra = _spectra(adapter, apart, selected, options)
    fixed = _fixed_nbytes(adapter, selected) + _nbytes(kept_whole)
    return rank_table(spectra, fixed, other_energy)


@dataclass(frozen=True)
class _Outcome:
    delta: ModuleChange
    report: ModuleReport
    squared_error: float
    squared_norm: float
    unchanged: bool


def _untouched(name: str, whole: ModuleChange, device: Device) -> _Outcome:
    delta = whole.require_factors()
    squared_norm = sum(part.squared_norm for part in matrices(delta, device))
    report = ModuleReport(name, delta.rank, delta.rank, 1.0, 0.0)
    return _Outcome(whole, report, 0.0, squared_norm, unchanged=True)


def _squeezed(
    name: str,
    whole: ModuleChange,
    parts: Sequence[Decomposed],
    rule: RankRule,
    rank: int | None,
    resizer: Resizer,
    keep_scale: bool | None,
) -> _Outcome:
    """Squeeze a module; `keep_scale` is None if it has no factors whose values could stay."""
    delta = whole.require_factors()
    spectrum = spectrum_of(name, delta, parts, resizer.options)
    rank = rule.of_module(spectrum) if rank is None else rank
    squared_norm = sum(part.squared_norm for part in parts)
    squared_error = 0.0
    new = None
    if keep_scale is None:
        rank = min(rank, delta.rank)
    else:
        new = resizer.without_loss(delta, rank, keep_scale=keep_scale)
    kept = squared_norm
    unchanged = new is not None and (new.rank, new.a.dtype, new.b.dtype) == (
        delta.rank,
        delta.a.dtype,
        delta.b.dtype,
    )
    if new is None:
        compressed = resizer.compressed(name, delta, parts, rank)
        new, squared_error, kept = compressed.delta, compressed.squared_error, compressed.energy
    energy = min(kept / squared_norm, 1.0) if squared_norm else 1.0
    error = _ratio(squared_error, squared_norm)
    report = ModuleReport(name, delta.rank, new.rank, energy, error)
    return _Outcome(whole.with_direction(new), report, squared_error, squared_norm, unchanged)


def _ratio(squared: float, squared_whole: float) -> float:
    return math.sqrt(squared / squared_whole) if squared_whole else 0.0


def _selected(adapter: Adapter, selection: Selection) -> set[str]:
    adapter.require_true_delta("squeeze")
    selected = {name for name in adapter.modules if name in selection}
    if not selected:
        raise AdapterError(
            "no module to squeeze",
            path=adapter.source,
            got=f"{len(adapter.modules)} modules in the adapter, none of them selected",
            hint="Module paths are listed by `loratools info -v`",
        )
    return selected


def _spectra(
    adapter: Adapter, apart: Mapping[str, Apart], selected: set[str], options: ComputeOptions
) -> list[Spectrum]:
    device = Device(options.device)

    def spectrum(name: str) -> Spectrum:
        delta = adapter.modules[name].require_factors()
        return spectrum_of(
            name, delta, parts_of(adapter.modules[name], apart.get(name), device), options
        )

    names = [name for name in adapter.modules if name in selected]
    return list(in_order(spectrum, names, options.threads))


def _fixed_nbytes(adapter: Adapter, selected: set[str]) -> int:
    """Return the bytes of the weight file that ranks do not change: other tensors, the header."""
    parts = [adapter.modules[name].require_factors() for name in selected]
    return _planned_nbytes(adapter) - sum(part.a.nbytes + part.b.nbytes for part in parts)


def _planned_nbytes(adapter: Adapter) -> int:
    return get_format(adapter.format).weights_nbytes(adapter)


def _check_budget(result: Adapter, rule: RankRule, input_nbytes: int) -> None:
    """Refuse what came out larger than the budget: a header that grew beyond all allowance."""
    if rule.budget is not None and _planned_nbytes(result) > rule.budget.resolve(input_nbytes):
        raise OptionError(
            "the budget is too small",
            got=f"{_planned_nbytes(result)} bytes",
            expected=f"at most {rule.budget.resolve(input_nbytes)}",
        )
