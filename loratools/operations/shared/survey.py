"""A first look at adapters, module by module: their sizes, and whose spaces overlap.

What makes adapters fit one pair of bases is not their angle: two with ΔWᵢ = U Σᵢ Vᵀ can have any
cosine. It is how far their columns, and their rows, lie in the same directions, weighted by how
much of ΔW lies there: the cosine of ΔWᵢΔWᵢᵀ with ΔWⱼΔWⱼᵀ, and of ΔWᵢᵀΔWᵢ with ΔWⱼᵀΔWⱼ. Both come
from the singular triplets. Their mean makes a tree by average linkage, as in `compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.clusters import clusters, linkage
from loratools.algebra.joint import Triplets
from loratools.algebra.linalg import gram_in_single
from loratools.work.parallel import in_order
from loratools_formats.core.dtypes import Array

Load = Callable[[str], Sequence[list[Triplets] | None]]
"""Returns the matrices that each adapter has in a module; None where it lacks the module."""


@dataclass(frozen=True)
class Survey:
    """What is known of all adapters before any basis is.

    Attributes:
        squared_norms: (N, M) ‖ΔW‖² of each adapter in each module.
        overlaps: (N, N) of the spaces, from 0 to 1; None if nobody asked.
    """

    squared_norms: Array
    overlaps: Array | None

    def groups(self, count: int) -> list[list[int]]:
        """Return the adapters of each of `count` groups, the largest group first."""
        total = len(self.squared_norms)
        if self.overlaps is None or total == 1:
            return [list(range(total))]
        merges = linkage(1.0 - self.overlaps)
        merges[:, 2] = np.arange(len(merges)) >= total - count  # in order; the last are undone
        return clusters(merges, 0.5)

    def around(self, count: int) -> list[list[int]]:
        """Return as many groups around adapters chosen one by one so that all lie near to one."""
        if self.overlaps is None:
            return self.groups(count)
        near = np.zeros(len(self.overlaps))
        middles: list[int] = []
        for _ in range(count):
            sums = np.maximum(self.overlaps, near).sum(axis=1)
            sums[middles] = -np.inf
            middles.append(int(np.argmax(sums)))
            near = np.maximum(near, self.overlaps[middles[-1]])
        nearest = np.argmax(self.overlaps[:, middles], axis=1)
        nearest[middles] = np.arange(count)
        return [[int(i) for i in np.flatnonzero(nearest == group)] for group in range(count)]


def survey(
    names: Sequence[str],
    load: Load,
    workers: int,
    *,
    with_overlaps: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Look at every module of all adapters once.

    Args:
        names: of the modules.
        load: returns the matrices of one module.
        workers: threads over modules; results do not depend on it.
        with_overlaps: whether to compare spaces, too.
        progress: called with the number of modules done.
    """

    def one(name: str) -> tuple[Array, Array | None]:
        loaded = load(name)
        norms = np.array([sum(t.squared_norm for t in each or ()) for each in loaded])
        return norms, _products(loaded) if with_overlaps else None

    columns: list[Array] = []
    total: Array = np.zeros(())
    for norms, products in in_order(one, names, workers):
        columns.append(norms)
        total = total if products is None else total + products
        progress(len(columns))
    squared_norms = np.stack(columns, axis=1)
    if not with_overlaps:
        return Survey(squared_norms, None)
    overlaps = np.zeros(total.shape[1:])
    for side in total:
        sizes = np.sqrt(side.diagonal())
        sizes[sizes == 0.0] = 1.0
        # A change whose fourth power is no number of float64 is like no other.
        with np.errstate(invalid="ignore"):
            overlaps += np.nan_to_num(side / sizes / sizes[:, None], posinf=0.0)
    return Survey(squared_norms, np.clip(overlaps / len(total), 0.0, 1.0))


def _products(loaded: Sequence[list[Triplets] | None]) -> Array:
    """Return ⟨ΔWᵢΔWᵢᵀ, ΔWⱼΔWⱼᵀ⟩ and ⟨ΔWᵢᵀΔWᵢ, ΔWⱼᵀΔWⱼ⟩ of one module: (2, N, N)."""
    found = np.zeros((2, len(loaded), len(loaded)))
    present = [i for i, each in enumerate(loaded) if each is not None]
    stacks = [each for each in loaded if each is not None]
    for matrices in zip(*stacks, strict=True):
        starts = np.cumsum([0, *(len(one.s) for one in matrices)])[:-1]
        scale = np.concatenate([one.s for one in matrices])
        kept = [k for k, one in enumerate(matrices) if len(one.s)]
        if not kept:
            continue
        places = np.ix_([present[k] for k in kept], [present[k] for k in kept])
        for side, bases in enumerate(([o.u for o in matrices], [o.v for o in matrices])):
            gram = gram_in_single(np.concatenate(bases, axis=1)) * np.outer(scale, scale)
            with np.errstate(over="ignore"):  # of what fits no type that is written
                sums = np.add.reduceat(gram * gram, starts[kept], axis=0)
                found[side][places] += np.add.reduceat(sums, starts[kept], axis=1)
    return found
