"""MiSS (once Bone): one small matrix repeated along the input (arXiv 2409.15371).

ΔW is `block` (r, out) transposed, side by side until `in` is reached; in its `mini` form the block
itself is repeated along the output. Source: `get_delta_weight_miss` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    block, (out, in_) = tensors["block"], weight.shape
    repeats = out // block.shape[1]
    if block.shape[1] * repeats != out or (repeats > 1 and not delta.settings["mini"]):
        divisor = " or a divisor of it" if delta.settings["mini"] else ""
        raise tensors.wrong_shape("block", f"(r, {out}{divisor})")
    rank = len(block)
    a = (np.arange(in_)[None, :] % rank == np.arange(rank)[:, None]).astype(np.float64)
    return Product(np.tile(block, repeats).T, a)


KIND = Kind(
    name="miss",
    title="MiSS",
    source="arXiv 2409.15371",
    parts=("block",),
    needs="shape",
    form=_form,
)
