"""BD-LoRA: one factor, or both, is block-diagonal, and only the blocks are stored.

ΔW = scale · B @ A. A of n blocks is stored as (r, in/n): row block i belongs to column block i. B
is stored as (out, r/n): row block i belongs to column block i. Source: `BdLoraLinearVariant` in
peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _expanded(blocks: Array, count: int) -> Array:
    """Return the block-diagonal matrix whose blocks lie below each other."""
    height, width = len(blocks) // count, blocks.shape[1]
    whole = np.zeros((len(blocks), count * width))
    for i in range(count):
        whole[i * height : (i + 1) * height, i * width : (i + 1) * width] = blocks[
            i * height : (i + 1) * height
        ]
    return whole


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, count = tensors["a"], tensors["b"], delta.settings["blocks"]
    if len(a) % count or len(b) % count:
        raise tensors.wrong_shape("a", f"rows that {count} blocks divide")
    if delta.settings["a_is_blocks"]:
        a = _expanded(a, count)
    if delta.settings["b_is_blocks"]:
        b = _expanded(b, count)
    if b.shape[1] != len(a):
        raise tensors.wrong_shape("b", f"(out, {len(a)}) once expanded")
    return Product(delta.settings["scale"] * b, a)


KIND = Kind(
    name="blockdiag",
    title="BD-LoRA",
    source="peft BdLoraLinearVariant",
    parts=("a", "b"),
    form=_form,
)
