"""LoCon with a Tucker core: a convolution between the two factors (LyCORIS, CP or Tucker form).

ΔW[o, i, k] = scale · Σ up[o, m] · mid[m, n, k] · down[n, i]. The core joins `down` without loss, so
the rank stays that of `up`.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    up, mid, down = tensors["up"], tensors["mid"], tensors["down"]
    up, down = up.reshape(len(up), -1), down.reshape(len(down), -1)
    if mid.shape[:2] != (up.shape[1], len(down)):
        raise tensors.wrong_shape("mid", f"({up.shape[1]}, {len(down)}, *kernel)")
    spread = np.einsum("mn...,nj->mj...", mid, down)
    return Product(delta.settings["scale"] * up, spread.reshape(len(mid), -1))


KIND = Kind(
    name="tucker",
    title="LoCon with a Tucker core",
    source="LyCORIS",
    parts=("up", "mid", "down"),
    form=_form,
)
