"""The original LoRA code: factors of linear layers, or of several outputs fused into one layer.

ΔW = α/r · B @ A. A layer that fuses n projections adapts only those that its constructor enabled:
with e of them enabled, A is (e·r, in) and B (e·out/n, r), group i of one belonging to group i of
the other, and the outputs of projections that are not enabled do not change. Neither α nor which
ones are enabled is in the file. Source: `Linear` and `MergedLinear` of microsoft/LoRA.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import Change, Kind, Product, Tensors, Weight
from loratools_formats.adapter import OtherDelta
from loratools_formats.errors import AdapterError


def _change(delta: OtherDelta, _: Weight) -> Change:
    tensors, settings = Tensors(delta), delta.settings
    a, b = tensors["a"], tensors["b"]
    rank = b.shape[1]
    scale = settings["alpha"] / rank
    groups = settings.get("groups")
    if groups is None:
        if len(a) != rank:
            raise tensors.wrong_shape("b", f"(out, {len(a)})")
        return Product(scale * b, a)
    enabled = [place for place, on in enumerate(groups) if on == "1"]
    if len(enabled) * rank != len(a) or len(b) % len(enabled):
        raise AdapterError(
            "the groups given do not fit the factors",
            got=f"{len(enabled)} enabled of {len(groups)}",
            expected=f"{len(a) // rank} enabled",
        )
    height = len(b) // len(enabled)
    new_b = np.zeros((height * len(groups), len(a)))
    for index, place in enumerate(enabled):
        columns = slice(index * rank, (index + 1) * rank)
        new_b[place * height : (place + 1) * height, columns] = b[
            index * height : (index + 1) * height
        ]
    return Product(scale * new_b, a)


KIND = Kind(
    name="loralib",
    title="LoRA of loralib",
    source="arXiv 2106.09685",
    parts=("a", "b"),
    change=_change,
)
