"""Plain LoRA and DoRA whose rows of q and k lie in torchtune's order.

ΔW = α/r · B @ A (`LoRALinear` and `DoRALinear` of torchtune 0.6.1). Where its rotary embedding
turns neighbouring rows, row 2j + t of a head is row j + t·(width/2) of transformers' head; rows of
B and of a DoRA's magnitude move alike, and A stays.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.core.factors import check_magnitude
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError


def _order(delta: KindDelta) -> Array:
    """Return which stored row each output is."""
    rows = delta.parts["b"].shape[0]
    settings = delta.settings
    if settings.get("rope") != "interleaved":
        return np.arange(rows)
    heads = settings.get("num_attention_heads") or settings["num_key_value_heads"]
    if rows % (2 * heads):
        raise AdapterError(
            "rows do not divide into heads of even width",
            tensor=delta.parts["b"].key,
            got=rows,
            expected=f"{heads} heads",
        )
    return np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    a, b = Tensors(delta).pair()
    return Product(delta.settings["alpha"] / len(a) * b[_order(delta)], a)


def _magnitude(delta: KindDelta, stored: TensorRef) -> TensorRef:
    order = _order(delta)
    check_magnitude(stored, len(order))
    return stored.reshaped((len(order), 1)).rows(order.tolist()).reshaped((len(order),))


KIND = Kind(
    name="torchtune",
    title="LoRA and DoRA of torchtune",
    source="torchtune 0.6.1, models/convert_weights.py",
    parts=("a", "b"),
    form=_form,
    magnitude=_magnitude,
)
