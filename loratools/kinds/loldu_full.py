"""LoLDU from a whole state dict: a residual and all factors (arXiv 2410.13618).

The trained weight is W' = residual + s · P·L·diag(z)·U with everything in the file, whatever
training began with; ΔW = W' − W, with the rounding of the residual in it. Source:
`minloldu/loldu.py` of SKDDJ/LoLDU 4fe87a0.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    residual, z = tensors["residual"], tensors["z"].reshape(-1)
    permutation, lower, upper = tensors["permutation"], tensors["lower"], tensors["upper"]
    out, in_ = residual.shape
    shapes = {"permutation": (out, out), "lower": (out, len(z)), "upper": (len(z), in_)}
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise tensors.wrong_shape(name, str(shape))
    if "copy" in tensors and not np.array_equal(tensors["copy"], residual):
        raise AdapterError(
            "the file's two copies of the residual differ", tensor=delta.parts["copy"].key
        )
    left = tensors["scale"].item() * (permutation @ lower) * z

    def rows(start: int, stop: int) -> Array:
        trained: Array = residual[start:stop] + left[start:stop] @ upper
        return trained - weight.rows(start, stop)

    return Rows((out, in_), rows)


KIND = Kind(
    name="loldu_full",
    title="LoLDU, its whole state dict",
    source="arXiv 2410.13618",
    parts=("residual", "permutation", "lower", "upper", "z", "scale"),
    optional=("copy", "mask"),
    needs="weight",
    low_rank=False,
    form=_form,
)
