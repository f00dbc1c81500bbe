"""FRoD: the weight in a basis that layers share, with trained and sparse entries between.

W = U diag(λ₀) Vᵀ defines U and λ₀ for the stored V (in, in), and W' = U (S + diag(λ)) Vᵀ with a
sparse S. Hence ΔW = W V⁻ᵀ diag(1/λ₀) (S + diag(λ)) Vᵀ − W. Source: `FrodLayer` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array

_LEAST_NORM = 1e-12


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    v, values, trained = tensors["v"], tensors["sparse"], tensors["diagonal"]
    places = tensors.integers("places")
    in_ = weight.shape[1]
    if v.shape != (in_, in_) or trained.shape != (in_,):
        raise tensors.wrong_shape("v", f"({in_}, {in_})")
    if places.shape != (2, len(values)) or (values.size and places.max() >= in_):
        raise tensors.wrong_shape("places", f"(2, {len(values)}) below {in_}")
    inner = np.diag(trained)
    np.add.at(inner, (places[0], places[1]), values)
    inverse = np.linalg.inv(v).T
    squares = np.zeros(in_)
    for span in row_spans(weight.shape):
        squares += np.sum((weight.rows(*span) @ inverse) ** 2, axis=0)
    norms = np.sqrt(squares)
    shrink = np.where(norms > _LEAST_NORM, 1.0 / np.maximum(norms, _LEAST_NORM), 0.0)
    turn = (inverse * shrink) @ inner @ v.T

    def rows(start: int, stop: int) -> Array:
        base = weight.rows(start, stop)
        result: Array = base @ turn - base
        return result

    return Rows(weight.shape, rows)


KIND = Kind(
    name="frod",
    title="FRoD",
    source="peft FrodLayer",
    parts=("v", "places", "sparse", "diagonal"),
    optional=("size",),
    needs="weight",
    low_rank=False,
    form=_form,
)
