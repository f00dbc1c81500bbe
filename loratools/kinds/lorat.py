"""LoRAT: a pair of factors for each equal part of a fused projection (arXiv 2403.05231).

ΔW = s · B @ A, s = α/r, or α/√r with rsLoRA. Of a layer that fuses q, k and v, or k and v, every
part has a pair of its own, and its rows lie in that order, as many for each; a part without a pair
does not change. Source: `LoRALayer` and `merge.py` of LitingLin/LoRAT 5260744.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.core.factors import scale_of


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors, parts = Tensors(delta), delta.settings["parts"]
    rslora = "rslora" in tensors and bool(tensors["rslora"].item())
    alpha = tensors["alpha"].item() if "alpha" in tensors else delta.settings["alpha"]
    blocks: list[tuple[int, Array, Array]] = []
    for part in parts or ("",):
        end = f".{part}" if part else ""
        if f"a{end}" not in tensors and part:
            continue
        a, b = tensors.pair(end)
        if blocks and len(b) != len(blocks[0][1]):
            raise tensors.wrong_shape(f"b{end}", f"{len(blocks[0][1])} rows, as the other parts")
        scale = scale_of(alpha, len(a), is_rooted=rslora)
        blocks.append((parts.find(part), scale * b, a))
    height, rank = len(blocks[0][1]), sum(len(a) for _, _, a in blocks)
    whole, column = np.zeros((height * max(len(parts), 1), rank)), 0
    for place, b, a in blocks:
        whole[place * height : (place + 1) * height, column : column + len(a)] = b
        column += len(a)
    return Product(whole, np.concatenate([a for _, _, a in blocks]))


KIND = Kind(
    name="lorat",
    title="LoRA of LoRAT",
    source="arXiv 2403.05231",
    parts=(),
    optional=("a", "b", "a.*", "b.*", "alpha", "rslora"),
    form=_form,
)
