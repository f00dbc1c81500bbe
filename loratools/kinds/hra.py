"""HRA: the input is reflected several times (arXiv 2405.17484).

W' = W Π (I − 2 uᵢuᵢᵀ) with unit vectors; ΔW = −2 Σ wᵢ uᵢᵀ has rank r at most, with wᵢ = W applied
to what the earlier reflections make of uᵢ. With `orthogonal` the vectors are made orthogonal first.
Source: `HRALinear.get_delta_weight` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    u = tensors["u"]
    if u.ndim != 2 or len(u) != weight.shape[1]:
        raise tensors.wrong_shape("u", f"({weight.shape[1]}, r)")
    rank = u.shape[1]
    if delta.settings["orthogonal"]:
        for i in range(rank):
            for j in range(i):
                u[:, i] -= (u[:, j] @ u[:, i]) * u[:, j]
            u[:, i] /= np.linalg.norm(u[:, i])
    else:
        u = u / np.linalg.norm(u, axis=0)
    # Π (I − 2uᵢuᵢᵀ) = I − 2 U T Uᵀ, T unit upper triangular, column by column.
    inner = u.T @ u
    t = np.zeros((rank, rank))
    for i in range(rank):
        t[i, i] = 1.0
        t[:i, i] = -2.0 * t[:i, :i] @ inner[:i, i]
    moved = np.concatenate([weight.rows(*span) @ u for span in row_spans(weight.shape)])
    return Product(-2.0 * moved @ t, u.T)


KIND = Kind(
    name="hra",
    title="HRA",
    source="arXiv 2405.17484",
    parts=("u",),
    needs="weight",
    form=_form,
)
