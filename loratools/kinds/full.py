"""A full difference: ΔW = scale · diff, of any rank (LyCORIS `diff`, extracted checkpoints).

It is read a block of rows at a time, unless it is stored as (in, out), when `crossed` is set.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.kinds.declaration import Array, Change, Kind, Rows, Weight
from loratools_formats.adapter import OtherDelta
from loratools_formats.errors import AdapterError


def _change(delta: OtherDelta, _: Weight) -> Change:
    diff, scale = delta.parts["diff"], delta.settings["scale"]
    height, width = diff.shape[0], math.prod(diff.shape[1:])

    def rows(start: int, stop: int) -> Array:
        flat = diff.elements(start * width, stop * width).astype(np.float64)
        if not np.isfinite(flat).all():
            raise AdapterError("tensor holds NaN or infinite values", tensor=diff.key)
        block: Array = scale * flat.reshape(stop - start, width)
        return block

    if not delta.settings.get("crossed"):
        return Rows((height, width), rows)
    whole = rows(0, height).astype(np.float32)
    return Rows((width, height), lambda start, stop: whole[:, start:stop].T.astype(np.float64))


KIND = Kind(
    name="full",
    title="full difference",
    source="LyCORIS",
    parts=("diff",),
    change=_change,
    low_rank=False,
)
