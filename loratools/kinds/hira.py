"""HiRA: the base weight times a low-rank product, entry by entry (ICLR 2025, TwJrTz9cRS).

ΔW = W ∘ (B @ A); the product alone is not the change. Source: peft 0.21.2, `HiraLayer._merge`.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b = tensors["a"], tensors["b"]
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if (len(b), a.shape[1]) != weight.shape or b.shape[1] != len(a):
        raise tensors.wrong_shape("b", f"factors of a weight {list(weight.shape)}")

    def rows(start: int, stop: int) -> Array:
        result: Array = weight.rows(start, stop) * (b[start:stop] @ a)
        return result

    return Rows(weight.shape, rows)


KIND = Kind(
    name="hira",
    title="HiRA",
    source="openreview TwJrTz9cRS",
    parts=("a", "b"),
    needs="weight",
    low_rank=False,
    form=_form,
)
