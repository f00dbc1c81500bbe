"""A full difference: ΔW = scale · diff, of any rank (LyCORIS `diff`, extracted checkpoints).

It is read in blocks of rows; with the setting `transposed` it is stored as (in, out), and read in
blocks of columns.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.kinds.declaration import Columns, DeltaForm, Kind, Rows, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    diff, scale = delta.parts["diff"], delta.settings["scale"]
    height, width = diff.shape[0], math.prod(diff.shape[1:])

    def rows(start: int, stop: int) -> Array:
        flat = diff.elements(start * width, stop * width).astype(np.float64, copy=False)
        if not np.isfinite(flat).all():
            raise AdapterError("tensor holds NaN or infinite values", tensor=diff.key)
        block: Array = flat.reshape(stop - start, width)
        return block if scale == 1.0 else scale * block

    if delta.settings.get("transposed"):
        return Columns((width, height), rows)
    return Rows((height, width), rows)


KIND = Kind(
    name="full",
    title="full difference",
    source="LyCORIS",
    parts=("diff",),
    form=_form,
    low_rank=False,
)
