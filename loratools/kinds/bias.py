"""BEFT: only the biases of layers change (arXiv 2509.15974).

ΔW = 0, Δb = `added` (1, out). Source: `BeftLayer` in peft 0.21.2, which cannot merge where the
layer has no bias.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import UnsupportedError


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors, (out, in_) = Tensors(delta), weight.shape
    if tensors["added"].size != out:
        raise tensors.wrong_shape("added", f"(1, {out})")
    if weight.bias() is None:
        raise UnsupportedError("the adapter changes the bias of a layer that has none in the base")
    return Product(np.zeros((out, 1)), np.zeros((1, in_)))


def _bias(delta: KindDelta, weight: Weight, bias: Array) -> Array:
    del weight, bias
    return Tensors(delta)["added"].reshape(-1)


KIND = Kind(
    name="bias",
    title="biases only (BEFT)",
    source="arXiv 2509.15974",
    parts=("added",),
    needs="weight",
    form=_form,
    bias=_bias,
)
