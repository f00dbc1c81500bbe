"""OSF: the small singular directions of a weight, trained on their own (arXiv 2504.07097).

ΔW = U diag(S) V − (W − W_k): the stored triplets replace all but the k largest of W, and there are
min(out, in) − k of them. Source: `OSFLayer` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    u, s, v = tensors["u"], tensors["s"], tensors["v"]
    if (len(u), v.shape[1]) != weight.shape or not u.shape[1] == len(s) == len(v):
        raise tensors.wrong_shape("u", f"triplets of a weight {list(weight.shape)}")
    kept = min(weight.shape) - len(s)
    _, _, right = np.linalg.svd(weight.rows(0, weight.shape[0]), full_matrices=False)
    top = right[:kept]

    def rows(start: int, stop: int) -> Array:
        base = weight.rows(start, stop)
        result: Array = (u[start:stop] * s) @ v - base + (base @ top.T) @ top
        return result

    return Rows(weight.shape, rows)


KIND = Kind(
    name="osf",
    title="OSF",
    source="arXiv 2504.07097",
    parts=("u", "s", "v"),
    needs="weight",
    low_rank=False,
    form=_form,
)
