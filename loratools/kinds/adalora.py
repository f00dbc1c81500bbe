"""AdaLoRA: factors with a diagonal between them, some of it pruned to zero (arXiv 2303.10512).

ΔW = scale · B @ (A ∘ E), E (r, 1). Source of the scale: peft's `SVDLinear`, α/(ranknum + 1e-5); the
reader resolves it.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, e = tensors["a"], tensors["b"], tensors["e"]
    if e.size != len(a) or b.shape[1] != len(a):
        raise tensors.wrong_shape("e", f"{len(a)} numbers")
    return Product(delta.settings["scale"] * b, a * e.reshape(-1, 1))


KIND = Kind(
    name="adalora",
    title="AdaLoRA",
    source="arXiv 2303.10512",
    parts=("a", "b", "e"),
    form=_form,
)
