"""Pairs of factors that are joined or split where a class has other modules than an adapter.

ΔW of a target is the sum of its pieces, each a pair of factors for some of its outputs in one of
its planes. Put together, `a` is stacked and `b` has a block for each; pieces of one `a` share it.
Bytes move; values change only where scales differ by no power of two, and are float32 then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from loratools.base.placement.changes import Placement, Span
from loratools_formats.core.change import Layer, LowRank
from loratools_formats.core.dtypes import (
    Array,
    DType,
    common_dtype,
    dtype_of_multiples,
    encode,
)
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError


@dataclass(frozen=True)
class Piece:
    """A part of a target's ΔW.

    Attributes:
        delta: the pair of factors that it is taken from, of one matrix or a stack.
        index: which matrix of the stack; 0 if there is one.
        rows: which outputs of the delta, in order; empty for all.
        plane: which matrix of the target.
        outputs: which outputs of the target, in order; empty for all.
    """

    delta: LowRank
    index: int
    rows: tuple[Span, ...]
    plane: int
    outputs: tuple[Span, ...]

    @property
    def rank(self) -> int:
        """Rank of its factors."""
        return self.delta.rank

    def a(self) -> Array:
        """Return its `a` as stored: (r, in)."""
        values = self.delta.a.load()
        return values[self.index] if values.ndim == 3 else values

    def b(self) -> Array:
        """Return the rows of its `b` as stored: (outputs, r)."""
        values = self.delta.b.load()
        whole = values[self.index] if values.ndim == 3 else values
        return np.concatenate([whole[s:e] for s, e in self.rows]) if self.rows else whole


def pieces(placement: Placement) -> list[Piece]:
    """Return what a placement puts where."""
    delta = placement.delta.require_factors()
    where = (placement.rows, placement.outputs)
    if placement.expert is not None:
        return [Piece(delta, placement.expert, where[0], placement.plane or 0, where[1])]
    if placement.plane is not None or delta.experts == 1:
        return [Piece(delta, 0, where[0], placement.plane or 0, where[1])]
    return [Piece(delta, i, where[0], i, where[1]) for i in range(delta.experts)]


def is_whole(placement: Placement) -> bool:
    """Return whether a placement is all of a delta on all of a tensor."""
    cut = placement.rows or placement.outputs
    return not cut and placement.expert is None and placement.plane is None


def put_together(
    parts: Sequence[Piece], planes: int | None, shape: tuple[int, int], layer: Layer
) -> LowRank:
    """Return the factors of a target.

    Args:
        parts: its pieces.
        planes: number of stacked matrices; None if it is one matrix.
        shape: (out, in) of each.
        layer: what the target is.

    Raises:
        AdapterError: pieces that do not fit.
    """
    # The target gets a scale that is not zero, of which the other scales are multiples.
    first = next((p.delta for p in parts if p.delta.scale != 0.0), parts[0].delta)
    if any(part.delta.bias is not None for part in parts):
        raise AdapterError(
            "biases of factors cannot be joined with other modules", tensor=first.a.key
        )
    dtype = common_dtype([t.dtype for part in parts for t in (part.delta.a, part.delta.b)])
    ratios = [1.0 if p.delta.scale == first.scale else p.delta.scale / first.scale for p in parts]
    wide = dtype_of_multiples(dtype, [ratio for ratio in ratios if ratio != 0.0])
    columns, rank = _columns(parts)
    stack = 1 if planes is None else planes
    dims_a = (rank, shape[1]) if planes is None else (stack, rank, shape[1])
    dims_b = (shape[0], rank) if planes is None else (stack, shape[0], rank)

    def a() -> Array:
        made = np.zeros((stack, rank, shape[1]), dtype=dtype.numpy_dtype())
        for part, column in zip(parts, columns, strict=True):
            made[part.plane, column : column + part.rank] = encode(part.a(), dtype)
        return made

    def b() -> Array:
        made = np.zeros((stack, shape[0], rank), dtype=wide.numpy_dtype())
        for part, column, ratio in zip(parts, columns, ratios, strict=True):
            values = part.b()
            values = values if ratio == 1.0 else values.astype(np.float64) * ratio
            at = 0
            for start, stop in part.outputs or ((0, shape[0]),):
                block = encode(values[at : at + stop - start], wide)
                made[part.plane, start:stop, column : column + part.rank] = block
                at += stop - start
        return made

    return replace(
        first,
        a=_made(first.a.key, dtype, dims_a, a),
        b=_made(first.b.key, wide, dims_b, b),
        layer=layer,
        alpha=None,
        alpha_tensor=None,
        bias=None,
    )


def _made(key: str, dtype: DType, shape: tuple[int, ...], values: Any) -> TensorRef:
    return TensorRef(key, dtype, shape, lambda: np.ascontiguousarray(values()).tobytes())


def _columns(parts: Sequence[Piece]) -> tuple[list[int], int]:
    """Return where each piece's rank begins in its plane, and the rank that holds all.

    Pieces of one plane that have one `a`, such as the gate and the up projection of an adapter that
    was cut, share it.
    """
    planes: dict[int, list[tuple[Piece, bytes, int]]] = {}
    columns = []
    for part in parts:
        here = planes.setdefault(part.plane, [])
        values = part.a().tobytes()
        shared = next(
            (at for other, its, at in here if its == values and not _overlap(other, part)), None
        )
        start = _end(here) if shared is None else shared
        here.append((part, values, start))
        columns.append(start)
    return columns, max(_end(here) for here in planes.values())


def _end(here: Sequence[tuple[Piece, bytes, int]]) -> int:
    return max((at + part.rank for part, _, at in here), default=0)


def _overlap(one: Piece, other: Piece) -> bool:
    if not one.outputs or not other.outputs:
        return True
    return any(a[1] > b[0] for a, b in pairwise(sorted((*one.outputs, *other.outputs))))
