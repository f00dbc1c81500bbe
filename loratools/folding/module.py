"""One module's change: checked against its declaration and weight, and stored as factors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools.folding.decomposed import rows_of
from loratools.kinds import get_kind
from loratools.kinds.declaration import Change, Kronecker, Product, Weight
from loratools.lowrank.resize import ComputeOptions, rounded
from loratools.work.scratch import Scratch
from loratools_formats.core.adapter import KindDelta, Layer, LowRank
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.kind_shapes import check_shapes
from loratools_formats.core.tensors import unmade
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
    check_shapes(kind.name, {**delta.shared, **delta.parts}, weight.shape)
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
    _check_size(name, change)
    return change


def _check_size(name: str, change: Change) -> None:
    """Refuse factors whose squares overflow; rows are checked as they are read."""
    if isinstance(change, Product):
        sides, scale = (change.b, change.a), 1.0
    elif isinstance(change, Kronecker):
        sides, scale = (change.left, change.right), change.scale
    else:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [float(np.vdot(side, side)) for side in sides]
        if not np.isfinite(np.prod([*squares, scale, scale])):
            raise AdapterError("squares of the weight change overflow float64", tensor=name)


def template_of(
    name: str, delta: LowRank | KindDelta, layer: Layer, shape: tuple[int, int], rank: int = 1
) -> LowRank:
    """Return a delta that says where and how to store factors; its values are not read."""
    out, in_ = shape
    wide = DTYPES["F32"]
    stack = (delta.experts,) if layer.kind == "experts" else ()
    return LowRank(
        unmade(f"{name}.a", wide, (*stack, rank, in_)),
        unmade(f"{name}.b", wide, (*stack, out, rank)),
        1.0,
        layer,
        bias=delta.bias,
    )


def stored_as_is(
    template: LowRank, change: Product, options: ComputeOptions, scratch: Scratch
) -> LowRank:
    """Store factors as they are, rounded once."""
    types = options.stored(template.b), options.stored(template.a)
    b, _ = rounded(change.b, types[0], template.b)
    a, _ = rounded(change.a, types[1], template.a)
    return replace(
        template,
        a=scratch.store(template.a.key, a, types[1]),
        b=scratch.store(template.b.key, b, types[0]),
    )
