"""One matrix beside its base weight: size, amplification, intruder dimensions, parts of change."""

from __future__ import annotations

import numpy as np

from loratools.algebra.intruders import amplification, leading_triplets
from loratools.algebra.thin import Thin
from loratools.base.decompositions import IntruderOptions, leading, leading_of_merged
from loratools.operations.spectrum.result import BaseMeasures
from loratools_formats.core.dtypes import Array

_NORM_TOLERANCE = 1e-6  # of a residual; the error of σ₁ is its square


def beside_base(weight: Array, delta: Thin, options: IntruderOptions) -> BaseMeasures:
    """Return what a matrix is beside its base weight.

    Args:
        weight: W (out, in) float64.
        delta: ΔW.
        options: how to look for intruder dimensions.
    """
    squared = float(np.vdot(weight, weight))
    top = _spectral_norm(weight) if squared else 0.0
    merged = delta.dense()
    merged += weight
    found, exact = None, False
    if squared > 0.0 and options.count > 0 and delta.is_product:
        found, exact = leading(weight, delta, options)
    elif squared > 0.0 and options.count > 0:
        found, exact = leading_of_merged(weight, merged, options)
    magnitude, direction = _parted(weight, merged)
    return BaseMeasures(
        relative_change=float(np.sqrt(delta.squared_norm / squared)) if squared else None,
        relative_spectral=float(delta.singular_values[0]) / top if top else None,
        amplification=amplification(weight, delta) if squared and delta.squared_norm else None,
        leading=0 if found is None else len(found.s),
        intruders=0 if found is None else len(found.intruders),
        undetermined=0 if found is None else found.verdicts.count("undetermined"),
        cosines=() if found is None else tuple(float(c) for c in found.cosines),
        exact=exact,
        magnitude_change=magnitude,
        direction_change=direction,
    )


def _spectral_norm(weight: Array) -> float:
    _, s, _ = leading_triplets(
        lambda x: weight @ x, lambda y: weight.T @ y, weight.shape, 1, _NORM_TOLERANCE
    )
    return float(s[0])


def _parted(weight: Array, merged: Array) -> tuple[float, float]:
    """Return ΔM and ΔD over outputs (arXiv 2402.09353, §3.2)."""
    before, after = np.linalg.norm(weight, axis=1), np.linalg.norm(merged, axis=1)
    products = before * after
    dots = np.einsum("ij,ij->i", weight, merged)
    cosines = np.divide(dots, products, out=np.ones_like(dots), where=products > 0.0)
    return float(np.abs(after - before).mean()), float((1.0 - cosines).mean())
