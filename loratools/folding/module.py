"""One module's change: checked against its declaration and weight, and stored as factors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools.folding.decomposed import rows_of
from loratools.kinds import get_kind
from loratools.kinds.declaration import Change, Product, Weight
from loratools.lowrank.resize import ComputeOptions, rounded
from loratools.work.scratch import Scratch
from loratools_formats.core.adapter import KindDelta, Layer, LowRank
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import TensorRef, unmade
from loratools_formats.disk.errors import AdapterError


def known_shape(delta: KindDelta) -> tuple[int, int]:
    """Return (out, in), 0 for what only the tensors of the change itself tell."""
    out, in_ = delta.shape
    return out or 0, in_ or 0


def checked_change(
    name: str, delta: KindDelta, weight: Weight, largest: tuple[int, int] = (0, 0)
) -> Change:
    """Return ΔW of a module, checked against the shape of its weight.

    Raises:
        AdapterError: tensors do not fit, or hold NaN or infinite values.
    """
    kind = get_kind(delta.kind)
    for part in kind.parts:
        if part not in delta.parts and part not in delta.shared:
            raise AdapterError(
                f"module lacks a tensor of kind {kind.name}", tensor=name, expected=part
            )
    unknown = [part for part in (*delta.parts, *delta.shared) if not kind.knows(part)]
    if unknown:
        raise AdapterError(
            f"module has a tensor that kind {kind.name} does not know",
            tensor=name,
            got=", ".join(sorted(unknown)),
        )
    if largest != (0, 0):
        delta = replace(delta, settings={**delta.settings, "largest": largest})
    with np.errstate(over="ignore", invalid="ignore"):
        change = kind.change(delta, weight)
    shape = rows_of(change).shape
    expected = tuple(side or found for side, found in zip(weight.shape, shape, strict=True))
    if shape != expected:
        raise AdapterError(
            "the weight change does not fit the weight", tensor=name, got=shape, expected=expected
        )
    return change


def planned_factors(
    name: str,
    layer: Layer,
    shape: tuple[int, int],
    *,
    rank: int = 1,
    experts: int = 1,
    bias: TensorRef | None = None,
) -> LowRank:
    """Return factors to be made in float32: of their tensors only name, type and shape are known.

    Args:
        name: the module.
        layer: what is adapted.
        shape: (out, in) of one matrix.
        rank: of the factors.
        experts: number of stacked matrices.
        bias: (out,), added to the layer's bias.
    """
    out, in_ = shape
    wide = DTYPES["F32"]
    stack = (experts,) if layer.kind == "experts" else ()
    return LowRank(
        unmade(f"{name}.a", wide, (*stack, rank, in_)),
        unmade(f"{name}.b", wide, (*stack, out, rank)),
        1.0,
        layer,
        bias=bias,
    )


def stored_as_is(
    planned: LowRank, change: Product, options: ComputeOptions, scratch: Scratch
) -> LowRank:
    """Store factors as they are, rounded once, in place of the planned ones."""
    types = options.stored(planned.b), options.stored(planned.a)
    b, _ = rounded(change.b, types[0], planned.b)
    a, _ = rounded(change.a, types[1], planned.a)
    return replace(
        planned,
        a=scratch.store(planned.a.key, a, types[1]),
        b=scratch.store(planned.b.key, b, types[0]),
    )
