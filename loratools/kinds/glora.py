"""GLoRA: entrywise factors and a summand for the weight, and three terms for the bias.

ΔW = W ∘ A + B, Δb = b ∘ D + E + W C, each of A … E being a low-rank product, a vector, a number or
nothing. Source: arXiv 2306.07967 and `GloraLayer.merge` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError

_NAMES = (
    *(f"{path}.{form}" for path in "ABC" for form in ("Xd", "Xu")),
    *(f"{path}.{form}" for path in "ABCDE" for form in ("X", "zeros")),
)


class _Path:
    """One of the five: a product Xd @ Xu, or something that broadcasts."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._down = self._up = None
        self._value: Array = np.zeros(1)
        if (f"{name}.Xd" in tensors) != (f"{name}.Xu" in tensors):
            raise AdapterError(f"module has one of {name}.Xd and {name}.Xu")
        if f"{name}.Xd" in tensors:
            self._down, self._up = tensors[f"{name}.Xd"], tensors[f"{name}.Xu"]
        else:
            # PEFT adds the buffer that stands for nothing, too, whatever a file holds in it.
            stored = [form for form in ("X", "zeros") if f"{name}.{form}" in tensors]
            if stored:
                self._value = tensors[f"{name}.{stored[0]}"]

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), or what broadcasts to them."""
        if self._down is not None and self._up is not None:
            product: Array = self._down[start:stop] @ self._up
            return product
        value = self._value
        return value[start:stop] if value.ndim == 2 and len(value) > 1 else value

    def whole(self) -> Array:
        """Return it all."""
        return self.rows(0, 1 << 60)


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    first, second = _Path(tensors, "A"), _Path(tensors, "B")

    def rows(start: int, stop: int) -> Array:
        base = weight.rows(start, stop)
        result: Array = base * first.rows(start, stop) + second.rows(start, stop)
        return np.broadcast_to(result, base.shape)

    return Rows(weight.shape, rows)


def _bias(delta: KindDelta, weight: Weight, bias: Array) -> Array:
    tensors = Tensors(delta)
    c, d, e = (_Path(tensors, name).whole().reshape(-1) for name in "CDE")
    column = np.broadcast_to(c, weight.shape[1:])
    moved = np.concatenate([weight.rows(*span) @ column for span in row_spans(weight.shape)])
    added: Array = bias * d + e + moved
    return added


KIND = Kind(
    name="glora",
    title="GLoRA",
    source="arXiv 2306.07967",
    parts=(),
    optional=_NAMES,
    needs="weight",
    low_rank=False,
    form=_form,
    bias=_bias,
)
