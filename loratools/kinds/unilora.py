"""Uni-LoRA: every entry of both factors is one of a few numbers, times its norm (arXiv 2506.00799).

A = bank[indices_a] ∘ scales_a, B alike, ΔW = B @ A.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _factor(tensors: Tensors, side: str) -> Array:
    bank, indices = tensors["bank"], tensors.integers(f"indices_{side}")
    if indices.max() >= len(bank):
        raise tensors.wrong_shape(f"indices_{side}", f"indices below {len(bank)}")
    factor: Array = bank[indices] * tensors[f"scales_{side}"]
    return factor


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    return Product(_factor(tensors, "b"), _factor(tensors, "a"))


KIND = Kind(
    name="unilora",
    title="Uni-LoRA",
    source="arXiv 2506.00799",
    parts=("bank", "indices_a", "indices_b", "scales_a", "scales_b"),
    form=_form,
)
