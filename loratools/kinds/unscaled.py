"""Plain LoRA whose scale is in none of the files that are left: LoRAFactory, ICM-LoRA.

ΔW = α/r · B @ A, or α/√r · B @ A with rsLoRA. Source: `lora.py` and `rslora.py` of MyTransformers
4037d4d, and PEFT's `LoraLayer`.
"""

from __future__ import annotations

import math

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors, settings = Tensors(delta), delta.settings
    a, b = tensors["a"], tensors["b"]
    if b.shape[1] != len(a):
        raise tensors.wrong_shape("b", f"(out, {len(a)})")
    root = math.sqrt(len(a)) if settings["variant"] == "rslora" else len(a)
    return Product(settings["alpha"] / root * b, a)


KIND = Kind(
    name="unscaled",
    title="LoRA that has lost its scale (LoRAFactory, ICM-LoRA)",
    source="MyTransformers, common/lora_modules/lora.py",
    parts=("a", "b"),
    form=_form,
)
