"""Average-linkage clustering of a few hundred things by their distances.

The merges are those of `scipy.cluster.hierarchy.linkage(..., "average")` (Sokal, Michener 1958):
the distance of two clusters is the mean over all pairs of their members.
"""

from __future__ import annotations

import numpy as np

from loratools_formats.core.dtypes import Array


def linkage(distances: Array) -> Array:
    """Return the merges of average linkage: (N − 1, 4), rows (cluster, cluster, distance, size).

    Clusters 0 … N−1 are the things themselves, N + i is made by row i; the smaller number is first.

    Args:
        distances: (N, N) symmetric.
    """
    count = len(distances)
    between = distances.astype(np.float64, copy=True)
    np.fill_diagonal(between, np.inf)
    numbers, sizes = np.arange(count), np.ones(count)
    merges = np.zeros((max(count - 1, 0), 4))
    for step in range(count - 1):
        i, j = np.unravel_index(int(np.argmin(between)), between.shape)
        i, j = min(i, j), max(i, j)
        first, second = sorted((numbers[i], numbers[j]))
        merges[step] = first, second, between[i, j], sizes[i] + sizes[j]
        mean = (sizes[i] * between[i] + sizes[j] * between[j]) / (sizes[i] + sizes[j])
        between[i], between[:, i] = mean, mean
        between[i, i] = np.inf
        between[j], between[:, j] = np.inf, np.inf
        numbers[i], sizes[i] = count + step, sizes[i] + sizes[j]
    return merges


def leaves(merges: Array) -> list[int]:
    """Return the things in the order in which a tree draws them without crossing."""
    count = len(merges) + 1
    members: dict[int, list[int]] = {i: [i] for i in range(count)}
    for step, (first, second, _, _) in enumerate(merges):
        members[count + step] = members.pop(int(first)) + members.pop(int(second))
    return members[max(members)]


def clusters(merges: Array, height: float) -> list[list[int]]:
    """Return the groups that merges below a height make, each in order, the largest first."""
    count = len(merges) + 1
    members: dict[int, list[int]] = {i: [i] for i in range(count)}
    for step, (first, second, distance, _) in enumerate(merges):
        if distance < height:
            members[count + step] = members.pop(int(first)) + members.pop(int(second))
    return sorted((sorted(group) for group in members.values()), key=lambda g: (-len(g), g))
