"""One module's change: checked against its declaration and weight, and stored as factors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools.folding.decomposed import rows_of
from loratools.kinds import get_kind
from loratools.kinds.declaration import DeltaForm, Kronecker, Product, Weight
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions, rounded
from loratools.work.scratch import Scratch
from loratools_formats.core.change import KindDelta, LowRank
from loratools_formats.core.kind_shapes import check_shapes
from loratools_formats.disk.errors import AdapterError


def known_shape(delta: KindDelta) -> tuple[int, int]:
    """Return (out, in), 0 for what only the tensors of the change itself tell."""
    out, in_ = delta.shape
    return out or 0, in_ or 0


def checked_form(
    name: str, delta: KindDelta, weight: Weight, largest: tuple[int, int] = (0, 0)
) -> DeltaForm:
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
        form = kind.form(delta, weight)
    shape = rows_of(form).shape
    expected = tuple(side or found for side, found in zip(weight.shape, shape, strict=True))
    if shape != expected:
        raise AdapterError(
            "the weight change does not fit the weight", tensor=name, got=shape, expected=expected
        )
    _check_size(name, form)
    return form


def _check_size(name: str, form: DeltaForm) -> None:
    """Refuse factors whose squares overflow; rows are checked as they are read."""
    if isinstance(form, Product):
        sides, scale = (form.b, form.a), 1.0
    elif isinstance(form, Kronecker):
        sides, scale = (form.left, form.right), form.scale
    else:
        return
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [float(np.vdot(side, side)) for side in sides]
        if not np.isfinite(np.prod([*squares, scale, scale])):
            raise AdapterError("squares of the weight change overflow float64", tensor=name)


def stored_as_is(
    planned: PlannedFactors, product: Product, options: ComputeOptions, scratch: Scratch
) -> LowRank:
    """Make planned factors of these values, each rounded once."""
    types = options.stored(planned.b), options.stored(planned.a)
    b, _ = rounded(product.b, types[0], planned.b.key)
    a, _ = rounded(product.a, types[1], planned.a.key)
    new_a = scratch.store(planned.a.key, a, types[1])
    new_b = scratch.store(planned.b.key, b, types[0])
    return planned.made(new_a, new_b, planned.scale, planned.bias)
