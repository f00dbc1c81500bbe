"""What stands out in an adapter, in sentences with numbers. Statistics, never verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loratools.algebra.measures import SpectrumMeasures
from loratools.algebra.median import median
from loratools.algebra.outliers import DEAD, ONE_SIDED, OUTLIER
from loratools.operations.spectrum.result import MatrixReport, Observation

_SPIKE = 0.9  # share of energy in one singular value, of a rank of at least 4
_CONCENTRATED = 8.0  # times what random singular vectors give
_KURTOSIS = 4.0  # times what random singular vectors give
_ORDER = ("non-finite", "dead", "outlier", "reference", "intruder", "spike", "rows", "columns")


def findings(matrices: Sequence[MatrixReport]) -> tuple[Observation, ...]:
    """Return what stands out, the gravest kinds first, then in path order."""
    norms = [m.measures.frobenius for m in matrices if m.measures is not None]
    usual = median(norms) if norms else 0.0
    found = [finding for matrix in matrices for finding in _of(matrix, usual)]
    rank = {kind: place for place, kind in enumerate(_ORDER)}
    return tuple(sorted(found, key=lambda finding: rank.get(finding.kind, len(_ORDER))))


def _of(matrix: MatrixReport, median: float) -> Iterator[Observation]:
    values = matrix.measures
    if not matrix.finite or values is None:
        yield Observation("non-finite", matrix.label, "its factors hold NaN or infinite values")
        return
    if values.frobenius <= DEAD * median:
        text = f"it changes nothing: ‖ΔW‖ = {values.frobenius:.3g}, the median is {median:.3g}"
        yield Observation("dead", matrix.label, text)
    if values.frobenius > 0.0:
        yield from _among_others(matrix, values)
        yield from _of_spectrum(matrix, values)
        yield from _of_entries(matrix)
        yield from _of_factors(matrix)


def _among_others(matrix: MatrixReport, values: SpectrumMeasures) -> Iterator[Observation]:
    score = matrix.family_score
    if score is not None and abs(score) > OUTLIER:
        side = "above" if score > 0 else "below"
        text = (
            f"‖ΔW‖ = {values.frobenius:.3g} is {abs(score):.1f} robust standard deviations {side} "
            "the trend of its kind over depth"
        )
        yield Observation("outlier", matrix.label, text)
    for measure, score in (matrix.reference_scores or {}).items():
        if abs(score) > OUTLIER:
            text = f"{measure} has z = {score:.1f} among the references"
            yield Observation("reference", matrix.label, text)


def _of_spectrum(matrix: MatrixReport, values: SpectrumMeasures) -> Iterator[Observation]:
    if matrix.base is not None and matrix.base.intruders:
        text = (
            f"{matrix.base.intruders} of the {matrix.base.leading} leading singular vectors of "
            "W + ΔW are intruder dimensions"
        )
        yield Observation("intruder", matrix.label, text)
    if (matrix.rank or 0) >= 4 and values.top_share >= _SPIKE:
        yield Observation(
            "spike", matrix.label, f"{values.top_share:.0%} of its energy is of rank 1"
        )


def _of_entries(matrix: MatrixReport) -> Iterator[Observation]:
    for kind, unit, ratio in (
        ("rows", "outputs", matrix.row_concentration),
        ("columns", "inputs", matrix.column_concentration),
    ):
        if ratio is not None and ratio > _CONCENTRATED:
            text = f"its energy lies in few {unit}: {ratio:.1f} times as much as at random"
            yield Observation(kind, matrix.label, text)
    measured, random = matrix.kurtosis, matrix.random_kurtosis
    if measured is not None and random is not None and measured > _KURTOSIS * random:
        text = f"its entries have kurtosis {measured:.1f}, at random {random:.1f}"
        yield Observation("kurtosis", matrix.label, text)


def _of_factors(matrix: MatrixReport) -> Iterator[Observation]:
    if matrix.balance is not None and not 1 / ONE_SIDED <= matrix.balance <= ONE_SIDED:
        text = f"‖b‖/‖a‖ = {matrix.balance:.3g}; a type of few bits may lose the smaller factor"
        yield Observation("one-sided", matrix.label, text)
    if matrix.dead_ranks:
        text = f"{matrix.dead_ranks} of its ranks are exactly zero"
        yield Observation("dead-ranks", matrix.label, text)
