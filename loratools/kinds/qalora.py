"""QA-LoRA: the input is pooled in groups before the first factor (arXiv 2309.14717).

The layer sees the mean of each group times the number of groups, so every column of A (r, in/group)
stands for a whole group. Source: `QALoraLinearVariant` in peft 0.21.2.
"""

from __future__ import annotations

from loratools.kinds.declaration import Change, Kind, Product, Tensors, Weight
from loratools_formats.adapter import OtherDelta


def _change(delta: OtherDelta, _: Weight) -> Change:
    tensors = Tensors(delta)
    a, b, group = tensors["a"], tensors["b"], delta.settings["group"]
    if b.shape[1] != len(a):
        raise tensors.wrong_shape("b", f"(out, {len(a)})")
    return Product(delta.settings["scale"] * b, (a * (a.shape[1] / group)).repeat(group, axis=1))


KIND = Kind(
    name="qalora",
    title="QA-LoRA",
    source="arXiv 2309.14717",
    parts=("a", "b"),
    change=_change,
)
