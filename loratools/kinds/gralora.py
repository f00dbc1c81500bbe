"""GraLoRA: a grid of low-rank blocks, perhaps ordinary factors beside it (arXiv 2505.20355).

Stored are A (k, in/k, r) and B (k, r, out/k). Each of the k² blocks has rank r/k: block row o and
block column n multiply the o-th part of A[n]'s ranks by the n-th part of B[o]'s ranks. Source:
`Linear.get_delta_weight` of gralora in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, scale = tensors["a"], tensors["b"], delta.settings["scale"]
    count, width, rank = a.shape
    height, part = b.shape[2], rank // count
    if b.shape[:2] != (count, rank) or rank % count:
        raise tensors.wrong_shape("b", f"({count}, {rank}, out/{count})")
    new_b = np.zeros((count * height, count * rank))
    new_a = np.zeros((count * rank, count * width))
    for o in range(count):
        for n in range(count):
            place = slice((o * count + n) * part, (o * count + n + 1) * part)
            new_b[o * height : (o + 1) * height, place] = b[o, n * part : (n + 1) * part].T
            new_a[place, n * width : (n + 1) * width] = a[n, :, o * part : (o + 1) * part].T
    if "general_a" in tensors:
        new_b = np.concatenate([new_b, tensors["general_b"]], axis=1)
        new_a = np.concatenate([new_a, tensors["general_a"]], axis=0)
    return Product(scale * new_b, new_a)


KIND = Kind(
    name="gralora",
    title="GraLoRA",
    source="arXiv 2505.20355",
    parts=("a", "b"),
    optional=("general_a", "general_b"),
    form=_form,
)
