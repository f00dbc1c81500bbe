"""The space that all factors of a module share.

With the factors of T adapters stacked, B = [B₁ … B_T] and A = [A₁; …; A_T], every ΔWₜ is
U·Mₜ·Vᵀ for orthonormal bases U of B's columns and V of A's rows, and an R×R core Mₜ, R = Σ rₜ.
Whatever commutes with orthogonal changes of basis can be computed on the cores, exactly, at cost
O(d·R²). Source: Core Space Merging, arXiv 2509.17786.

The bases come from the SVD of the stacked factors, after every adapter is brought to its balanced
form U√S, √SVᵀ: so they depend on the deltas only, not on how each file splits them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loratools.algebra import linalg
from loratools.algebra.one_matrix import column_signs
from loratools_formats.core.dtypes import Array

_RELATIVE_FLOOR = 1e-10


@dataclass(frozen=True)
class SharedSpace:
    """Bases and cores.

    Attributes:
        u: (m, R_b) orthonormal columns.
        v: (n, R_a) orthonormal columns.
        cores: (T, R_b, R_a); ΔWₜ = u @ cores[t] @ v.T.
        shape: (m, n).
        ranks: rank of each adapter's delta; 0 where it does not have the module.
    """

    u: Array
    v: Array
    cores: Array
    shape: tuple[int, int]
    ranks: tuple[int, ...]


def shared_space(pairs: list[tuple[Array, Array] | None], shape: tuple[int, int]) -> SharedSpace:
    """Return the shared space of deltas given as factors of scale 1.

    Args:
        pairs: (b (m, r), a (r, n)) in float64 for each adapter, None where it has no delta.
        shape: (m, n).
    """
    balanced = [None if pair is None else _balanced(*pair) for pair in pairs]
    present = [factors for factors in balanced if factors is not None]
    u = _basis(np.concatenate([factors.b for factors in present], axis=1))
    v = _basis(np.concatenate([factors.a.T for factors in present], axis=1))
    cores = np.zeros((len(pairs), u.shape[1], v.shape[1]))
    for index, factors in enumerate(balanced):
        if factors is not None:
            cores[index] = (u.T @ factors.b) @ (factors.a @ v)
    ranks = tuple(0 if factors is None else factors.a.shape[0] for factors in balanced)
    return SharedSpace(u, v, cores, shape, ranks)


def _balanced(b: Array, a: Array) -> linalg.Factors:
    """Return U√S and √SVᵀ without the directions that are only rounding."""
    whole = linalg.qr_factors(b, a, 1.0, a.shape[0])
    sizes = whole.singular_values
    count = max(1, int(np.count_nonzero(sizes > _RELATIVE_FLOOR * sizes[0])))
    return linalg.Factors(whole.b[:, :count], whole.a[:count], sizes[:count])


def _basis(stacked: Array) -> Array:
    """Return orthonormal columns that span those of `stacked`, in order of importance."""
    q, r = np.linalg.qr(stacked)
    left, sizes, _ = np.linalg.svd(r)
    count = max(1, int(np.count_nonzero(sizes > _RELATIVE_FLOOR * sizes[0])))
    basis: Array = q @ left[:, :count]
    return basis * column_signs(basis)


def lifted(space: SharedSpace, core: Array) -> tuple[Array, Array]:
    """Return factors (b, a) of u @ core @ v.T."""
    return space.u @ core, space.v.T
