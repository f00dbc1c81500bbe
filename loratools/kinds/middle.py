"""Factors with a matrix between them: LoRA-XS, LoRA-SB, NLoRA (arXiv 2405.17604, 2411.19557).

ΔW = scale · B @ M @ A, M (r, r). Only M is trained in the first two, where A and B come from an
SVD: without M they are a large part of the base weight.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, middle = tensors["a"], tensors["b"], tensors["middle"]
    if middle.shape != (b.shape[1], len(a)):
        raise tensors.wrong_shape("middle", f"({b.shape[1]}, {len(a)})")
    return Product(delta.settings["scale"] * b, middle @ a)


KIND = Kind(
    name="middle",
    title="LoRA with a middle matrix (LoRA-XS, LoRA-SB, NLoRA)",
    source="arXiv 2405.17604",
    parts=("a", "b", "middle"),
    form=_form,
)
