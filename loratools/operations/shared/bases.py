"""The bases and cores of one module of one group, as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.joint import Bases, Joint, Triplets
from loratools.lowrank.resize import rounded
from loratools.operations.shared.options import Cores
from loratools.work.scratch import Scratch
from loratools_formats.contract.shared_set import Part
from loratools_formats.core.dtypes import Array, DType
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError


@dataclass(frozen=True)
class Made:
    """One module of one group.

    Attributes:
        part: what is stored.
        squared_errors: ‖ΔW − ΔW'‖² of each member, of what is stored.
    """

    part: Part
    squared_errors: tuple[float, ...]


def joints_of(loaded: Sequence[list[Triplets]], weights: Sequence[float]) -> list[Joint]:
    """Return the joint cores of all members, one for each stacked matrix."""
    return [Joint(list(matrices), weights) for matrices in zip(*loaded, strict=True)]


def made(
    name: str,
    loaded: Sequence[list[Triplets]],
    joints: Sequence[Joint],
    rank: int,
    members: tuple[int, ...],
    *,
    cores: Cores,
    dtype: DType,
    is_stack: bool,
    scratch: Scratch,
) -> Made:
    """Return the bases of a rank and the cores that fit best to them as they are stored.

    Args:
        name: module path.
        loaded: the matrices of each member.
        joints: of each matrix.
        rank: of the bases.
        members: places of the members in the set.
        cores: how to find the bases.
        dtype: to store.
        is_stack: whether the weight is a stack of matrices.
        scratch: where results wait.

    Raises:
        AdapterError: values do not fit the type.
    """
    bases = [_bases(joint, rank, cores) for joint in joints]
    widths = [max(pair[side].shape[1] for pair in bases) for side in (0, 1)]
    u = np.stack([_widened(pair[0], widths[0]) for pair in bases])
    v = np.stack([_widened(pair[1], widths[1]).T for pair in bases])
    (u, u_back), (v, v_back) = rounded(u, dtype, name), rounded(v, dtype, name)
    stored = [
        Bases.of(one, other.T, diagonal=cores == "diagonal")
        for one, other in zip(u_back, v_back, strict=True)
    ]
    found, errors = [], []
    for matrices in loaded:
        core, error = fitted(name, stored, matrices, dtype)
        found.append(core)
        errors.append(error)
    stack = np.stack(found)
    if not is_stack:
        u, v, stack = u[0], v[0], stack[:, 0]
    part = Part(
        scratch.store(name, u, dtype),
        scratch.store(name, v, dtype),
        scratch.store(name, stack, dtype),
        members,
    )
    return Made(part, tuple(errors))


def fitted(
    name: str, stored: Sequence[Bases], matrices: Sequence[Triplets], dtype: DType
) -> tuple[Array, float]:
    """Return the cores of a member in stored bases, rounded, and their squared error.

    Args:
        name: module path.
        stored: bases of each matrix, with the values that are stored.
        matrices: of the member.
        dtype: to store.

    Returns:
        (E, kᵤ, kᵥ) or (E, k) in the type, and ‖ΔW − ΔW'‖²_F.

    Raises:
        AdapterError: values do not fit the type.
    """
    exact = [bases.core(one) for bases, one in zip(stored, matrices, strict=True)]
    core, back = rounded(np.stack(exact), dtype, name)
    triples = zip(stored, matrices, back, strict=True)
    return core, sum(bases.squared_error(one, c) for bases, one, c in triples)


def stored_bases(part: Part, *, diagonal: bool) -> list[Bases]:
    """Return the bases of each matrix as a set stores them.

    Raises:
        AdapterError: one holds NaN or infinite values.
    """
    u, v = finite(part.u), finite(part.v)
    pairs = zip(u.reshape(-1, *u.shape[-2:]), v.reshape(-1, *v.shape[-2:]), strict=True)
    return [Bases.of(one, other.T, diagonal=diagonal) for one, other in pairs]


def finite(tensor: TensorRef) -> Array:
    """Return the values of a stored basis or core in float64.

    Raises:
        AdapterError: some are NaN or infinite.
    """
    values = tensor.load(np.float64)
    if not np.isfinite(values).all():
        raise AdapterError("tensor of a shared set holds NaN or infinite values", tensor=tensor.key)
    return values


def cores_of(core: TensorRef, count: int, *, diagonal: bool) -> Array:
    """Return the cores of a member: (E, kᵤ, kᵥ) float64, diagonal ones as matrices.

    Raises:
        AdapterError: one holds NaN or infinite values.
    """
    values = finite(core)
    if not diagonal:
        return values.reshape(count, *values.shape[-2:])
    return np.stack([np.diag(row) for row in values.reshape(count, values.shape[-1])])


def _bases(joint: Joint, rank: int, cores: Cores) -> tuple[Array, Array]:
    if cores == "diagonal":
        return joint.diagonal(rank)
    return joint.full(rank) if cores == "full" else joint.principal(rank)


def _widened(basis: Array, width: int) -> Array:
    """Return a basis with at least one column, and zeros up to a width."""
    return np.pad(basis, ((0, 0), (0, max(width, 1) - basis.shape[1])))
