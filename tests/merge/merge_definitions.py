"""What merge methods are, written entry by entry in float64 and sharing no code with loratools.

From the papers: TIES 2306.01708, DARE 2311.03099, DELLA 2406.11617, Breadcrumbs 2312.06795,
SCE 2408.07990, KnOTS 2410.19735, TSV-M 2412.00081, Iso-C 2502.04959, Core Space 2509.17786.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from loratools_formats.core.dtypes import Array


def trimmed(
    x: Array, density: float, least: int = 0, thresholds: Sequence[float] | None = None
) -> Array:
    """Keep the entries of each task that are among its largest."""
    x = np.array(x, np.float64)
    if density >= 1.0:
        return x
    for task, values in enumerate(x):
        keep = max(least, int(density * values.size))
        if thresholds is not None:
            limit = thresholds[task]
        else:
            ordered = np.sort(np.abs(values).ravel())
            limit = ordered[-keep] if keep else math.inf
        values[np.abs(values) < limit] = 0.0
    return x


def elected(
    x: Array, weights: Sequence[float], majority: str, flavor: str, divide: bool = True
) -> Array:
    """Elect a sign at each place and combine the tasks that have it."""
    result = np.zeros(x.shape[1:])
    for place in np.ndindex(*result.shape):
        values = [float(task[place]) for task in x]
        weighted = [w * v for w, v in zip(weights, values, strict=True)]
        voters = values if flavor == "peft" else weighted
        signs = [(v > 0) - (v < 0) for v in voters]
        vote = sum(voters) if majority == "total" else sum(signs)
        winner = 1 if vote >= 0 else -1
        agreeing = [t for t, sign in enumerate(signs) if sign == winner]
        total = sum(weighted[t] for t in agreeing)
        if divide and flavor == "mergekit":
            total /= sum(weights[t] for t in agreeing) or 1.0
        elif divide:
            total /= max(1, len(agreeing))
        result[place] = total
    return result


def summed(x: Sequence[Array], weights: Sequence[float]) -> Array:
    """Σ w·x."""
    return sum(w * np.array(task, np.float64) for w, task in zip(weights, x, strict=True))


def dropped(x: Array, numbers: Array, chances: Any, flavor: str) -> Array:
    """Keep entries at random, and make up for what is lost."""
    x = np.array(x, np.float64)
    kept = np.where(numbers < chances, x, 0.0)
    if flavor != "mergekit":
        return kept / chances
    before, after = np.abs(x).sum(axis=(1, 2)), np.abs(kept).sum(axis=(1, 2))
    return kept * (before / after)[:, None, None]


def della_chances(x: Array, density: float, epsilon: float) -> Array:
    """p = ρ − ε + 2ε·(place from the smallest)/(n − 1), within each row."""
    chances = np.empty(x.shape)
    for task, row in np.ndindex(*x.shape[:2]):
        order = sorted(range(x.shape[2]), key=lambda column: abs(x[task, row, column]))
        for place, column in enumerate(order):
            chances[task, row, column] = density - epsilon + 2 * epsilon * place / (x.shape[2] - 1)
    return chances


def without_outliers(x: Array, density: float, gamma: float) -> Array:
    """Drop the γ share of largest entries, then the smallest until ρ are left."""
    x = np.array(x, np.float64)
    for values in x:
        size = values.size
        keep, top = int(density * size), int(gamma * size)
        order = np.argsort(np.abs(values).ravel())
        start = max(0, size - keep - top)
        dropped_places = set(range(size)) - set(order[start : start + keep])
        values.reshape(-1)[sorted(dropped_places)] = 0.0
    return x


def sce_definition(x: Array, density: float) -> Array:
    """Select where tasks vary most, weigh tasks by their energy there, erase minority signs."""
    x = np.array(x, np.float64)
    variance = x.var(axis=0)
    if density < 1.0:
        keep = int(np.count_nonzero(variance) * density)
        limit = sorted(variance.ravel(), reverse=True)[keep - 1] if keep else math.inf
        x = np.where(variance >= limit, x, 0.0)
    energy = np.array([np.mean(task**2) for task in x])
    shares = energy / energy.sum() if energy.sum() else np.full(len(x), 1 / len(x))
    result = np.zeros(x.shape[1:])
    for place in np.ndindex(*result.shape):
        values = [task[place] for task in x]
        winner = 1 if sum(values) >= 0 else -1
        agreeing = [t for t, v in enumerate(values) if v * winner > 0]
        mass = sum(shares[t] for t in agreeing)
        if agreeing:
            result[place] = sum(shares[t] * values[t] for t in agreeing) / max(mass, 1e-6)
    return result


def polar(matrix: Array) -> Array:
    """Return the closest matrix of orthonormal columns."""
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    result: Array = u @ vt
    return result


def nonzero(values: Array) -> int:
    """Return how many singular values are more than rounding."""
    return int(np.count_nonzero(values > 1e-9 * max(values[0], 1e-300)))


def knots_definition(
    deltas: Array, weights: Sequence[float], density: float, majority: str, flavor: str
) -> Array:
    """Merge the right factors of the joint SVD by TIES, on float32 entries.

    TIES takes + where votes are even, so vectors get signs: the largest entry on the left is > 0.
    """
    u, s, _ = np.linalg.svd(np.concatenate(list(deltas), axis=1), full_matrices=False)
    u, s = u[:, : nonzero(s)], s[: nonzero(s)]
    u = u * largest_signs(u)
    # From the deltas, so that a zero delta has a zero part, not one of rounding.
    x = np.stack([u.T @ delta / s[:, None] for delta in deltas]).astype(np.float32)
    merged: Array = (u * s) @ elected(trimmed(x, density), weights, majority, flavor)
    return merged


def largest_signs(vectors: Array) -> Array:
    """Return the sign of each column's largest entry."""
    signs: Array = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    return signs


def tsv_definition(deltas: Array, weights: Sequence[float]) -> Array:
    """Keep min(m, n)/T triplets of each task, and make their vectors orthogonal across tasks."""
    most = max(1, min(deltas.shape[1:]) // len(deltas))
    left, sizes, right = [], [], []
    for weight, delta in zip(weights, deltas, strict=True):
        u, s, vt = np.linalg.svd(weight * delta, full_matrices=False)
        kept = min(most, nonzero(s))
        left.append(u[:, :kept])
        sizes.append(s[:kept])
        right.append(vt[:kept].T)
    u, v = polar(np.concatenate(left, axis=1)), polar(np.concatenate(right, axis=1))
    merged: Array = (u * np.concatenate(sizes)) @ v.T
    return merged


def iso_definition(deltas: Array, weights: Sequence[float]) -> Array:
    """Give the nonzero singular values of the sum their mean."""
    u, s, vt = np.linalg.svd(summed(deltas, weights), full_matrices=False)
    kept = nonzero(s)
    merged: Array = s[:kept].mean() * u[:, :kept] @ vt[:kept]
    return merged


def core_space(deltas: Array) -> tuple[Array, Array, Array]:
    """Return U (m, R), V (n, R) and the float32 cores UᵀΔV, from the balanced factors."""
    lefts, rights = [], []
    for delta in deltas:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        kept = nonzero(s) if s[0] else 0
        lefts.append(u[:, :kept] * np.sqrt(s[:kept]))
        rights.append(vt[:kept].T * np.sqrt(s[:kept]))
    u, v = (_left_vectors(np.concatenate(parts, axis=1)) for parts in (lefts, rights))
    return u, v, np.stack([u.T @ delta @ v for delta in deltas]).astype(np.float32)


def _left_vectors(stacked: Array) -> Array:
    u, s, _ = np.linalg.svd(stacked, full_matrices=False)
    u = u[:, : nonzero(s)]
    return u * largest_signs(u)
