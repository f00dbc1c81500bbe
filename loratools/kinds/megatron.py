"""LoRA and DoRA of Megatron: one factor pair for projections that its model fuses.

ΔW = α/r · B @ A, α/r after `ParallelLinearAdapter` of Megatron-Bridge and NeMo. `linear_qkv` puts
the rows of every query group one behind another: the group's queries, its key, its value, each as
high as a head. `linear_fc1` puts those of the gate above those of the up projection. What one
projection has of B and of a magnitude are its rows; A is the same for all of them.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.core.factors import check_magnitude
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError


def _rows(delta: KindDelta, total: int) -> Array:
    """Return which of the stored rows are the projection's, in order."""
    settings, part = delta.settings, delta.settings["projection"]
    rows = np.arange(total)
    if part in ("q", "k", "v"):
        heads, groups = settings["num_attention_heads"], settings["num_key_value_heads"]
        if heads % groups or total % (heads + 2 * groups):
            raise AdapterError(
                "rows do not divide into heads",
                got=total,
                expected=f"{heads} and 2 · {groups} heads",
            )
        of_group = rows.reshape(groups, heads // groups + 2, -1)
        taken = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}[part]
        return of_group[:, taken].reshape(-1)
    if part in ("gate", "up"):
        width = settings.get("moe_intermediate_size") or settings["intermediate_size"]
        if total != 2 * width:
            raise AdapterError(
                "linear_fc1 is not a gate above an up projection",
                got=f"{total} rows",
                expected=f"2 · {width}",
            )
        return rows[:width] if part == "gate" else rows[width:]
    return rows


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    a, b = Tensors(delta).pair()
    return Product(delta.settings["alpha"] / len(a) * b[_rows(delta, len(b))], a)


def _magnitude(delta: KindDelta, stored: TensorRef) -> TensorRef:
    rows = {**delta.shared, **delta.parts}["b"].shape[0]
    check_magnitude(stored, rows)
    order = _rows(delta, rows)
    return stored.reshaped((rows, 1)).rows(order.tolist()).reshaped((len(order),))


KIND = Kind(
    name="megatron",
    title="LoRA and DoRA of Megatron and NeMo",
    source="Megatron-Bridge, peft/utils.py",
    parts=("a", "b"),
    optional=("magnitude",),
    form=_form,
    magnitude=_magnitude,
)
