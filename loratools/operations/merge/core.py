"""Methods computed in the space that all factors share: exact, and never larger than R×n."""

from __future__ import annotations

import numpy as np

from loratools.algebra.one_matrix import column_signs
from loratools.operations.merge.elementwise import ties
from loratools.operations.merge.methods import Method
from loratools.operations.merge.sign_election import Flavor, MajoritySign
from loratools.operations.merge.space import SharedSpace, lifted
from loratools.operations.merge.tasks import DenseRows, Tasks
from loratools_formats.core.dtypes import Array

_RELATIVE_FLOOR = 1e-10


def _nonzero(values: Array) -> int:
    return int(np.count_nonzero(values > _RELATIVE_FLOOR * values[0])) if values[0] > 0.0 else 0


def knots(
    space: SharedSpace,
    weights: Array,
    *,
    density: float = 0.2,
    majority_sign: MajoritySign = "total",
    flavor: Flavor = "peft",
    lambda_: float = 1.0,
) -> tuple[Array, Array]:
    """Align the deltas by a joint SVD and merge their right factors with TIES.

    [ΔW₁ … ΔW_T] = UΣ[V₁ᵀ … V_Tᵀ]; the result is λ·UΣ·ties(V₁ᵀ, …, V_Tᵀ). The SVD is that of the
    R × TR matrix of cores.
    """
    count, _, width = space.cores.shape
    joined = np.concatenate(list(space.cores), axis=1)
    u, s, _ = np.linalg.svd(joined, full_matrices=False)
    kept = max(1, _nonzero(s))
    u, s = u[:, :kept], s[:kept]
    # Where votes are even, TIES chooses +, so the arbitrary signs of an SVD must be settled.
    u = u * column_signs(space.u @ u)
    # Not the SVD's own right factors: where an adapter has no delta, those are noise, which votes.
    vt = (u.T @ joined) / np.where(s > 0.0, s, 1.0)[:, None]
    aligned = [DenseRows(vt[:, t * width : (t + 1) * width] @ space.v.T) for t in range(count)]
    tasks = Tasks(aligned, (kept, space.shape[1]), 0, "")
    merged = ties(tasks, weights, density=density, majority_sign=majority_sign, flavor=flavor)
    rows = np.concatenate([*tasks.each(merged)])
    return space.u @ (lambda_ * u * s), rows


def tsv(space: SharedSpace, weights: Array, *, lambda_: float = 1.0) -> tuple[Array, Array]:
    """Keep each task's leading singular vectors, make them orthogonal across tasks, add up.

    Of each task the top min(m, n)/T triplets stay (TSV-M); stacked left and right vectors are
    replaced by their nearest orthonormal ones, so that tasks do not interfere.
    """
    count = len(weights)
    most = max(1, min(space.shape) // count)
    left, sizes, right = [], [], []
    for weight, core in zip(weights, space.cores, strict=True):
        u, s, vt = np.linalg.svd(core, full_matrices=False)
        kept = min(_nonzero(s), most) if weight else 0
        left.append(np.sign(weight) * u[:, :kept])
        sizes.append(abs(weight) * s[:kept])
        right.append(vt[:kept].T)
    u = _nearest_orthonormal(np.concatenate(left, axis=1))
    v = _nearest_orthonormal(np.concatenate(right, axis=1))
    return lifted(space, lambda_ * (u * np.concatenate(sizes)) @ v.T)


def _nearest_orthonormal(matrix: Array) -> Array:
    """Return the orthogonal polar factor UVᵀ of a matrix."""
    if matrix.shape[1] == 0:
        return matrix
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    result: Array = u @ vt
    return result


def iso(space: SharedSpace, weights: Array, *, lambda_: float = 1.0) -> tuple[Array, Array]:
    """Give all singular values of the summed delta their mean (Iso-C).

    Only the nonzero ones count: averaged over all min(m, n), the null space would be filled with
    arbitrary vectors.
    """
    total = np.tensordot(weights, space.cores, axes=1)
    u, s, vt = np.linalg.svd(total, full_matrices=False)
    kept = _nonzero(s)
    mean = float(s[:kept].mean()) if kept else 0.0
    return lifted(space, lambda_ * mean * (u[:, :kept] @ vt[:kept]))


KNOTS = Method(
    "knots", "core", "Joint SVD, then TIES on the right factors.", "arXiv 2410.19735", knots
)
TSV = Method(
    "tsv",
    "core",
    "Task singular vectors made orthogonal across tasks (TSV-M).",
    "arXiv 2412.00081",
    tsv,
)
ISO = Method("iso", "core", "Sum with all singular values equal (Iso-C).", "arXiv 2502.04959", iso)
