"""Dropping ranks that are only rounding noise, such as those left when a fused module is split.

A fused module's factors may be dense, such as those of an SVD, though each of its pieces is of
lower rank; the spectrum of a piece then falls to the rounding of its stored values at its rank.
Values of 16 bits round too coarsely to tell, so those pieces keep the rank they share.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Matrix
from loratools.lowrank.matrices import matrices
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import DType, encode
from loratools_formats.core.tensors import Buffer, TensorRef

_ROUNDING = {"F32": 2.0**-21, "F64": 2.0**-49}  # of the largest singular value


def of_true_rank(change: ModuleChange, *, keep_scale: bool = False) -> ModuleChange:
    """Drop ranks that are only rounding noise, such as those left when a fused module is split.

    Args:
        change: any; a change without factors of 32 bits or more is returned unchanged.
        keep_scale: whether its scale stays beside the factors, instead of moving into them.

    Raises:
        AdapterError: a factor holds NaN or infinite values.
    """
    part = change.factors
    return change if part is None else change.with_direction(_without_noise(part, keep_scale))


def _without_noise(delta: LowRank, keep_scale: bool) -> LowRank:
    if delta.bias is not None or delta.experts > 1:
        return delta
    roundings = [_ROUNDING.get(tensor.dtype.code) for tensor in (delta.a, delta.b)]
    known = [rounding for rounding in roundings if rounding is not None]
    if len(known) < len(roundings) or delta.scale == 0.0:
        return delta
    values = _matrix(delta).singular_values
    rank = max(1, int(np.count_nonzero(values > max(known) * values[0])))
    if rank == delta.rank:
        return delta
    scale = delta.scale if keep_scale else 1.0
    return replace(
        delta,
        a=_made(delta, delta.a, rank, math.sqrt(abs(scale)), is_a=True),
        b=_made(delta, delta.b, rank, math.copysign(math.sqrt(abs(scale)), scale), is_a=False),
        scale=scale,
        alpha=None if delta.alpha is None else scale * rank,
        alpha_tensor=None,
    )


def _matrix(delta: LowRank) -> Matrix:
    (matrix,) = matrices(delta, Device("cpu"))
    return matrix


def _made(delta: LowRank, tensor: TensorRef, rank: int, divisor: float, *, is_a: bool) -> TensorRef:
    """Return a factor that is computed when it is read, so that none waits in memory."""
    dtype: DType = tensor.dtype
    shape = (rank, tensor.shape[1]) if is_a else (tensor.shape[0], rank)

    def read() -> Buffer:
        factors = _matrix(delta).factors(rank)
        values = encode(factors[1 if is_a else 0] / divisor, dtype)
        return values.reshape(-1).view(np.uint8).data

    return TensorRef(tensor.key, dtype, shape, read)
