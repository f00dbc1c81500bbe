"""QA-LoRA: the input is pooled in groups before the first factor (arXiv 2309.14717).

The layer sees the mean of each group times the number of groups, so every column of A (r, in/group)
stands for a whole group. PEFT does this on GPTQ layers only, and trains plain factors on others,
with the same configuration: the inputs of the weight tell which. Source: `QALoraLinearVariant` in
peft 0.21.2.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b = tensors.pair()
    group = delta.settings["group"]
    count, in_ = a.shape[1], weight.shape[1]
    if count * group == in_:
        a = (a * (count / group)).repeat(group, axis=1)
    elif count != in_:
        raise tensors.wrong_shape("a", f"(r, {in_}), or (r, {in_}/{group})")
    return Product(delta.settings["scale"] * b, a)


KIND = Kind(
    name="qalora",
    title="QA-LoRA",
    source="arXiv 2309.14717",
    parts=("a", "b"),
    needs="shape",
    form=_form,
)
