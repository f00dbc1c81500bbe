"""GLoRA of LyCORIS: ΔW = scale · (W a₁ a₂ + b₁ b₂), of low rank once the weight is known.

A convolution's W a₁ a₂ mixes inputs at each place of the kernel by itself. PEFT's GLoRA is another:
see `glora`. Source: arXiv 2306.07967 and `GLoRAModule` in lycoris-lora 4.1.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a1, a2, b1, b2 = (tensors[name] for name in ("a1", "a2", "b1", "b2"))
    a1, a2, b1, b2 = (factor.reshape(len(factor), -1) for factor in (a1, a2, b1, b2))
    out, columns = weight.shape
    if a1.shape != a2.shape[::-1] or columns % len(a1):
        raise tensors.wrong_shape("a1", f"(in, r) with a2 {list(a2.shape)} and {columns} columns")
    if len(b1) != out or b1.shape[1] != len(b2) or b2.shape[1] != columns:
        raise tensors.wrong_shape("b2", f"(r, {columns}) for b1 ({out}, r)")
    kernel = columns // len(a1)
    mixed = np.empty((out, a1.shape[1] * kernel))
    for start, stop in row_spans(weight.shape):
        rows = weight.rows(start, stop).reshape(stop - start, len(a1), kernel)
        mixed[start:stop] = np.einsum("oik,ir->ork", rows, a1, optimize=True).reshape(
            stop - start, -1
        )
    scale = delta.settings["scale"]
    return Product(
        scale * np.concatenate([mixed, b1], axis=1),
        np.concatenate([np.kron(a2, np.eye(kernel)), b2]),
    )


KIND = Kind(
    name="lycoris_glora",
    title="GLoRA of LyCORIS",
    source="arXiv 2306.07967",
    parts=("a1", "a2", "b1", "b2"),
    needs="weight",
    form=_form,
)
