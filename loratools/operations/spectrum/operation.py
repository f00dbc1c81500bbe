"""Measures every module of an adapter from its factors, and beside the base where there is one.

Without a base nothing larger than a factor is held: singular values come from r×r Gram matrices,
row and column energies from the factors. The sources of all definitions are in `algebra.measures`,
`algebra.outliers` and `algebra.intruders`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from loratools.algebra.measures import concentration, kurtosis, measures
from loratools.algebra.outliers import family_of, layer_of, numbers_in, scores_in_families
from loratools.algebra.thin import Thin
from loratools.base.decompositions import IntruderOptions
from loratools.folding.expert_sides import straight_beside
from loratools.folding.thin_modules import NonFiniteError, ThinModule, ThinModules
from loratools.folding.weights_beside import WeightsBeside
from loratools.operations.spectrum.against import reference_scores
from loratools.operations.spectrum.beside_base import beside_base
from loratools.operations.spectrum.findings import findings
from loratools.operations.spectrum.result import BaseMeasures, MatrixReport, SpectrumResult
from loratools.operations.spectrum.suggested import suggestions, table
from loratools.work.parallel import done_in_order
from loratools.work.requests import Progress
from loratools.work.selection import Selection, require_selected
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, UnsupportedError

Opened = tuple[list[MatrixReport], ThinModule | None, Finding | None]


def spectrum(
    adapter: Adapter,
    *,
    base: Checkpoint | None = None,
    intruders: IntruderOptions | None = None,
    entries: bool = False,
    selection: Selection | None = None,
    given: Mapping[str, str] | None = None,
    references: Sequence[Adapter] = (),
    workers: int = 2,
    progress: Progress | None = None,
) -> SpectrumResult:
    """Measure what is in an adapter.

    Args:
        adapter: of any kind.
        base: the base model; DoRAs are measured by their directions without it, and other kinds
            that depend on it are refused.
        intruders: how to look for intruder dimensions, where there is a base.
        entries: also stream every entry of ΔW, for its kurtosis.
        selection: modules to measure.
        given: settings that neither the file nor the base's configuration holds, by name.
        references: adapters whose measures give the mean and spread for z-scores.
        workers: threads over modules; results do not depend on it.
        progress: called with (modules done, modules in all).

    Raises:
        UnsupportedError: a change depends on the base, or is not known.
        AdapterError: no modules, none selected, or tensors that do not fit.
    """
    adapter = straight_beside(adapter, base)
    opener = ThinModules(adapter, base, "spectrum", given)
    selection = selection or Selection()
    require_selected(selection, opener.modules, "measure", adapter.source)
    names = [name for name in opener.modules if name in selection]
    beside = None if base is None else WeightsBeside(opener.adapter, base)
    options = intruders or IntruderOptions()

    def one(name: str) -> Opened:
        try:
            module = opener.open(name)
        except NonFiniteError:
            return [_not_finite(name, opener)], None, None
        measured, note = _beside(module, opener, beside, options)
        reports = [
            _report(module, index, measured[index] if measured else None, entries=entries)
            for index in range(len(module.matrices))
        ]
        return reports, module.without_matrices(), note

    done = done_in_order(one, names, workers, progress)
    matrices = _scored([report for reports, _, _ in done for report in reports])
    if references:
        matrices = reference_scores(matrices, references, base)
    measured = [module for _, module, _ in done if module is not None]
    complete = len(measured) == len(adapter.modules)
    return SpectrumResult(
        source=None if adapter.source is None else str(adapter.source),
        matrices=tuple(matrices),
        findings=findings(matrices),
        choices=table(opener, measured) if complete else (),
        suggestions=suggestions(opener, measured) if complete else (),
        layers=_summed(matrices, lambda report: layer_of(report.name)),
        families=_summed(matrices, lambda report: family_of(report.name)),
        frobenius=_norm(matrices),
        bytes_in=adapter.weights_nbytes,
        directional=opener.directional,
        notices=tuple(notice for _, _, notice in done if notice is not None),
    )


def _beside(
    module: ThinModule,
    opener: ThinModules,
    beside: WeightsBeside | None,
    options: IntruderOptions,
) -> tuple[list[BaseMeasures], Finding | None]:
    """Return a module's measures beside its base weights, or why there are none."""
    if beside is None:
        return [], None
    whole = opener.adapter.modules[module.name]
    try:
        weights = beside.load(module.name, whole)
    except UnsupportedError as error:
        message = f"{module.name} is not compared with the base: {error.message}"
        return [], Finding("not-beside-base", "warning", module.name, message)
    if len(weights) != len(module.matrices) or weights[0].shape != module.shape:
        raise AdapterError(
            "the weight change does not fit the weight",
            tensor=module.name,
            got=module.shape,
            expected=weights[0].shape,
        )
    pairs = zip(weights, module.matrices, strict=True)
    return [beside_base(weight, thin, options) for weight, thin in pairs], None


def _report(
    module: ThinModule, index: int, base: BaseMeasures | None, *, entries: bool
) -> MatrixReport:
    thin = module.matrices[index]
    found = measures(thin.singular_values, module.shape, thin.tail)
    spread = found.participation_ratio or 1.0
    measured, random = kurtosis(thin, spread) if entries and not thin.tail else (None, None)
    size_b, size_a = (math.sqrt(float(np.trace(g))) for g in (thin.grams.b, thin.grams.a))
    is_factored = module.rank is not None
    return MatrixReport(
        name=module.name,
        expert=index if module.layer.kind == "experts" else None,
        kind=module.kind,
        layer=module.layer.kind,
        shape=module.shape,
        rank=module.rank,
        alpha=module.alpha,
        scale=module.scale,
        finite=True,
        singular_values=tuple(thin.singular_values.tolist()),
        measures=found,
        tail=thin.tail / thin.squared_norm if thin.tail else 0.0,
        balance=size_b / size_a if is_factored and size_a > 0.0 else None,
        dead_ranks=_dead_ranks(thin) if is_factored else 0,
        row_concentration=None if thin.tail else concentration(thin.row_energies(), spread),
        column_concentration=None if thin.tail else concentration(thin.column_energies(), spread),
        kurtosis=measured,
        random_kurtosis=random,
        base=base,
    )


def _dead_ranks(thin: Thin) -> int:
    return int(np.count_nonzero((np.diag(thin.grams.b) == 0.0) | (np.diag(thin.grams.a) == 0.0)))


def _not_finite(name: str, opener: ThinModules) -> MatrixReport:
    part = opener.modules[name].require_factors()
    return MatrixReport(
        name, None, "lora", part.layer.kind, part.shape, part.rank, part.alpha, part.scale, False
    )


def _scored(matrices: list[MatrixReport]) -> list[MatrixReport]:
    norms = {m.label: m.measures.frobenius for m in matrices if m.measures is not None}
    scores = scores_in_families(norms)
    return [replace(matrix, family_score=scores.get(matrix.label)) for matrix in matrices]


def _summed(
    matrices: Sequence[MatrixReport], group: Callable[[MatrixReport], str]
) -> dict[str, float]:
    groups: dict[str, list[MatrixReport]] = defaultdict(list)
    for matrix in matrices:
        groups[group(matrix)].append(matrix)
    ordered = sorted(groups, key=lambda name: (numbers_in(name), name))
    return {name: _norm(groups[name]) for name in ordered}


def _norm(matrices: Sequence[MatrixReport]) -> float:
    return math.sqrt(sum(m.measures.frobenius**2 for m in matrices if m.measures is not None))
