"""IA³ of LyCORIS: W' = (1 + l) ∘ W per output or per input; biases stay as they are.

PEFT's IA³ stores the factor itself and scales biases of outputs too: see `ia3`. Source:
arXiv 2205.05638 and `IA3Module` in lycoris-lora 4.1.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Tensors, Weight
from loratools.kinds.ia3 import scaled
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    return scaled(tensors, tensors["gain"].reshape(-1), weight, on_input=delta.settings["on_input"])


KIND = Kind(
    name="lycoris_ia3",
    title="IA³ of LyCORIS",
    source="arXiv 2205.05638",
    parts=("gain", "on_input"),
    needs="weight",
    low_rank=False,
    form=_form,
)
