"""Factors with a gate per rank between them: SoRA (arXiv 2311.11696).

ΔW = α/r · B @ diag(gate) @ A, r with the dead ranks; a gate of zero is a dead rank.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, gate = tensors["a"], tensors["b"], tensors["gate"].reshape(-1)
    if not len(gate) == len(a) == b.shape[1]:
        raise tensors.wrong_shape("gate", f"{len(a)} numbers")
    scale = delta.settings["alpha"] / len(a)
    return Product(scale * b, a * gate[:, None])


KIND = Kind(
    name="gated",
    title="LoRA with gates (SoRA)",
    source="arXiv 2311.11696",
    parts=("a", "b", "gate"),
    form=_form,
)
