"""KaSA: factors with a diagonal between them, on a base without its smallest directions.

ΔW = scale · B diag(d) A − W_small, W_small being the r smallest singular triplets of the weight,
which training took away: rank 2r. Source: arXiv 2412.06071 and `KasaLinearVariant` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, diagonal = tensors["a"], tensors["b"], tensors["diagonal"].reshape(-1)
    rank = len(a)
    if not b.shape[1] == len(diagonal) == rank or rank >= min(weight.shape):
        raise tensors.wrong_shape("diagonal", f"{rank} numbers")
    u, s, vt = np.linalg.svd(weight.rows(0, weight.shape[0]), full_matrices=False)
    small_b, small_a = u[:, -rank:] * s[-rank:], vt[-rank:]
    return Product(
        np.concatenate([delta.settings["scale"] * b, -small_b], axis=1),
        np.concatenate([diagonal[:, None] * a, small_a], axis=0),
    )


KIND = Kind(
    name="kasa",
    title="KaSA",
    source="arXiv 2412.06071",
    parts=("a", "b", "diagonal"),
    needs="weight",
    form=_form,
)
