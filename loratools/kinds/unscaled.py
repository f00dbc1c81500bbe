"""Plain LoRA whose scale is in none of the files that are left: LoRAFactory, ICM-LoRA.

ΔW = α/r · B @ A, or α/√r · B @ A with rsLoRA. Source: `lora.py` and `rslora.py` of MyTransformers
4037d4d, and PEFT's `LoraLayer`.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.factors import scale_of


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    a, b = Tensors(delta).pair()
    settings = delta.settings
    scale = scale_of(settings["alpha"], len(a), is_rooted=settings["variant"] == "rslora")
    return Product(scale * b, a)


KIND = Kind(
    name="unscaled",
    title="LoRA that has lost its scale (LoRAFactory, ICM-LoRA)",
    source="MyTransformers, common/lora_modules/lora.py",
    parts=("a", "b"),
    form=_form,
)
