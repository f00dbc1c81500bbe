"""PEANuT: a small network applied to the base weight (arXiv 2410.01870).

ΔW = scale · B hᵀ, h (in, r) being what the network makes of Wᵀ Aᵀ, row by row: an activation, then
encoders, then decoders, each decoder's result with the input of its encoder added. W alone
determines it, and its rank is r. Source: `PeanutLayer` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools.kinds.numbers.activations import activation
from loratools_formats.core.change import KindDelta
from loratools_formats.disk.errors import AdapterError


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors, bend = Tensors(delta), activation(delta.settings["activation"])
    a, b, depth = tensors["a"], tensors["b"], delta.settings["depth"]
    out, in_ = weight.shape
    if a.shape[1:] != (out,) or b.shape != a.shape[::-1]:
        raise tensors.wrong_shape("a", f"(r, {out}), and its transpose for B")
    layers = [f"{side}.{i}" for side in ("encoder", "decoder") for i in range(depth)]
    if {*delta.parts} != {"a", "b", *layers}:
        raise AdapterError(
            "the file holds a different number of layers than its config says",
            got=", ".join(sorted({*delta.parts} - {"a", "b"})),
            expected=f"{depth} encoders and decoders",
        )
    projected = np.zeros((in_, len(a)))
    for start, stop in row_spans(weight.shape):
        projected += weight.rows(start, stop).T @ a[:, start:stop].T
    hidden = bend(projected)
    below = []
    for i in range(depth):
        below.append(hidden)
        hidden = bend(hidden @ tensors[f"encoder.{i}"].T)
    for i in range(depth):
        hidden = bend(hidden @ tensors[f"decoder.{i}"].T) + below.pop()
    return Product(delta.settings["scale"] * b, hidden.T)


KIND = Kind(
    name="peanut",
    title="PEANuT",
    source="arXiv 2410.01870",
    parts=("a", "b"),
    optional=("encoder.*", "decoder.*"),
    needs="weight",
    form=_form,
)
