"""Methods whose result is a weighted sum of the deltas.

Each returns the coefficients cₜ of Σ cₜ·ΔWₜ from the Gram matrix Gᵢⱼ = ⟨ΔWᵢ, ΔWⱼ⟩ of one module, so
the sum is exact in factor space: concatenated factors, nothing else. A module that an adapter does
not have has a row of zeros.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.operations.merge.methods import Method
from loratools.operations.merge.weightless import says_nothing
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import OptionError

_MOST_ITERATIONS = 1000  # it settles in ten


def linear(gram: Array, weights: Array, *, normalize: bool = False) -> Array:
    """Σ wₜ·ΔWₜ; with `normalize` divided by Σ wₜ (task arithmetic).

    Raises:
        OptionError: weights to normalise add up to zero.
    """
    total = float(weights.sum())
    if not normalize:
        return weights
    if abs(total) < 1e-12:
        raise OptionError("weights that add up to zero cannot be normalised", got=weights.tolist())
    return weights / total


def cat(gram: Array, weights: Array) -> Array:
    """Σ wₜ·ΔWₜ, factors only put beside each other."""
    return weights


def fedex(gram: Array, weights: Array) -> Array:
    """The exact weighted mean of federated adapters."""
    return linear(gram, weights, normalize=True)


def slerp(gram: Array, weights: Array, *, t: float | None = None) -> Array:
    """Move along the arc from the first delta to the second.

    sin((1−t)θ)/sin θ · ΔW₀ + sin(tθ)/sin θ · ΔW₁ with θ the angle between them; by default t is the
    second weight's share. Where a delta is zero or both are parallel, the straight line.

    Raises:
        OptionError: the weights do not give a t.
    """
    total = float(weights.sum())
    if t is None:
        if abs(total) < 1e-12:
            raise OptionError("weights add up to zero, so they give no t", hint="Pass `set=t=0.5`")
        t = float(weights[1]) / total
    norms = np.sqrt(np.diag(gram))
    product = float(norms[0] * norms[1])
    cosine = float(gram[0, 1]) / product if product > 0.0 else 1.0
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-7:
        return np.array([1.0 - t, t])
    return np.array([math.sin((1.0 - t) * angle), math.sin(t * angle)]) / math.sin(angle)


def karcher(gram: Array, weights: Array, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """The mean direction on the sphere (Riemannian centre of mass), times the mean norm.

    Iterates on coefficients of the unit deltas, with K their matrix of cosines.

    Raises:
        OptionError: weights add up to zero, or more iterations than could ever help.
    """
    if not 0 <= max_iter <= _MOST_ITERATIONS:
        raise OptionError("karcher: max_iter", got=max_iter, expected=f"0 to {_MOST_ITERATIONS}")
    norms = np.sqrt(np.diag(gram))
    present = norms > tol * max(float(norms.max()), 1e-300)
    if not present.any():
        return np.zeros_like(weights)
    shares = linear(gram, weights, normalize=True)
    length = float(shares @ norms)
    inner = linear(gram, np.where(present, shares, 0.0), normalize=True)
    units = np.where(present, norms, 1.0)
    cosines = np.where(np.outer(present, present), gram / np.outer(units, units), 0.0)
    np.fill_diagonal(cosines, present)
    mean = inner.copy()
    size = math.sqrt(max(float(mean @ cosines @ mean), 0.0))
    mean = np.eye(len(weights))[int(np.argmax(present))] if size < tol else mean / size
    for _ in range(max_iter):
        tangent = np.zeros_like(mean)
        dots = np.clip(cosines @ mean, -1.0, 1.0)
        for index in np.flatnonzero(present):
            angle = math.acos(float(dots[index]))
            # Opposite to the mean, all directions are as good, and noise would choose one.
            if tol <= angle <= math.pi - 1e-6:
                step = np.eye(len(mean))[index] - dots[index] * mean
                tangent += inner[index] * angle / math.sin(angle) * step
        speed = math.sqrt(max(float(tangent @ cosines @ tangent), 0.0))
        if speed < tol:
            break
        mean = math.cos(speed) * mean + math.sin(speed) * tangent / speed
        mean = mean / math.sqrt(float(mean @ cosines @ mean))
    result: Array = length * mean / units
    return result


def model_stock(gram: Array, weights: Array) -> Array:
    """T times the mean delta, t = N·cos θ / (1 + (N−1)·cos θ) with the mean pairwise cosine.

    Raises:
        OptionError: weights that the method has no place for: they differ, or are not above 0.
    """
    if not says_nothing(weights):
        raise OptionError("model_stock takes no weights", got=weights.tolist())
    count = len(weights)
    if count == 1:
        return np.ones(1)
    norms = np.maximum(np.outer(np.sqrt(np.diag(gram)), np.sqrt(np.diag(gram))), 1e-300)
    cosines = np.clip(gram / norms, -1.0, 1.0)
    cosine = float(cosines[np.triu_indices(count, 1)].mean())
    divisor = 1.0 + (count - 1) * cosine
    t = count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    return np.full(count, t / count)


LINEAR = Method(
    "linear",
    "span",
    "Weighted sum of the deltas (task arithmetic), exact.",
    "arXiv 2212.04089",
    linear,
    scales=True,
)
CAT = Method(
    "cat",
    "span",
    "Weighted sum with all ranks kept, uncompressed.",
    "PEFT add_weighted_adapter",
    cat,
    uncompressed=True,
    scales=True,
)
FEDEX = Method(
    "fedex",
    "span",
    "Exact mean of federated adapters, with the residual of averaging factors.",
    "arXiv 2410.09432",
    fedex,
)
SLERP = Method(
    "slerp",
    "span",
    "Spherical interpolation between two deltas.",
    "mergekit nuslerp",
    slerp,
    least=2,
    most=2,
)
KARCHER = Method(
    "karcher",
    "span",
    "Mean direction on the sphere times the mean norm.",
    "arXiv 2603.04972",
    karcher,
)
MODEL_STOCK = Method(
    "model_stock",
    "span",
    "Mean of the deltas, shortened by the angle between them.",
    "arXiv 2403.19522",
    model_stock,
)
