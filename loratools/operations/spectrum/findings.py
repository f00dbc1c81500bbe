"""What stands out in an adapter, in sentences with numbers. Statistics, never verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from loratools.algebra.outliers import DEAD, ONE_SIDED, OUTLIER
from loratools.operations.spectrum.result import Finding, MatrixReport

_SPIKE = 0.9  # share of energy in one singular value, of a rank of at least 4
_CONCENTRATED = 8.0  # times what random singular vectors give
_KURTOSIS = 4.0  # times what random singular vectors give
_ORDER = ("non-finite", "dead", "outlier", "reference", "intruder", "spike", "rows", "columns")


def findings(matrices: Sequence[MatrixReport]) -> tuple[Finding, ...]:
    """Return what stands out, the gravest kinds first, then in path order."""
    norms = [m.measures.frobenius for m in matrices if m.measures is not None]
    median = float(np.median(norms)) if norms else 0.0
    found = [finding for matrix in matrices for finding in _of(matrix, median)]
    rank = {kind: place for place, kind in enumerate(_ORDER)}
    return tuple(sorted(found, key=lambda finding: rank.get(finding.kind, len(_ORDER))))


def _of(matrix: MatrixReport, median: float) -> Iterator[Finding]:
    label, values = matrix.label, matrix.measures
    if not matrix.finite or values is None:
        yield Finding("non-finite", label, "its factors hold NaN or infinite values")
        return
    if values.frobenius <= DEAD * median or values.frobenius == 0.0:
        size = f"‖ΔW‖ = {values.frobenius:.3g}, the median is {median:.3g}"
        yield Finding("dead", label, f"it changes nothing: {size}")
        if values.frobenius == 0.0:
            return
    if matrix.family_score is not None and abs(matrix.family_score) > OUTLIER:
        side = "above" if matrix.family_score > 0 else "below"
        yield Finding(
            "outlier",
            label,
            f"‖ΔW‖ = {values.frobenius:.3g} is {abs(matrix.family_score):.1f} robust standard "
            f"deviations {side} the trend of its kind over depth",
        )
    for measure, score in (matrix.reference_scores or {}).items():
        if abs(score) > OUTLIER:
            yield Finding("reference", label, f"{measure} has z = {score:.1f} in the references")
    if matrix.base is not None and matrix.base.intruders:
        yield Finding(
            "intruder",
            label,
            f"{matrix.base.intruders} of the {matrix.base.leading} leading singular vectors of "
            "W + ΔW are intruder dimensions",
        )
    if (matrix.rank or 0) >= 4 and values.top_share >= _SPIKE:
        yield Finding("spike", label, f"{values.top_share:.0%} of its energy is of rank 1")
    for kind, unit, ratio in (
        ("rows", "outputs", matrix.row_concentration),
        ("columns", "inputs", matrix.column_concentration),
    ):
        if ratio is not None and ratio > _CONCENTRATED:
            yield Finding(
                kind, label, f"its energy lies in few {unit}: {ratio:.1f} times as much as at random"
            )
    if matrix.kurtosis is not None and matrix.random_kurtosis is not None:
        ratio = matrix.kurtosis / (matrix.random_kurtosis or 1.0)
        if ratio > _KURTOSIS:
            yield Finding(
                "kurtosis",
                label,
                f"its entries have kurtosis {matrix.kurtosis:.1f}, at random "
                f"{matrix.random_kurtosis:.1f}",
            )
    if matrix.balance is not None and not 1 / ONE_SIDED <= matrix.balance <= ONE_SIDED:
        yield Finding(
            "one-sided", label, f"‖b‖/‖a‖ = {matrix.balance:.3g}; a low type may lose the small one"
        )
    if matrix.dead_ranks:
        yield Finding("dead-ranks", label, f"{matrix.dead_ranks} of its ranks are exactly zero")
