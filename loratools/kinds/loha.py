"""LoHa: the entrywise product of two low-rank products (FedPara, arXiv 2108.06098).

ΔW = scale · (w1_a @ w1_b) ∘ (w2_a @ w2_b), which is itself a product of the row-wise and the
column-wise Khatri–Rao products of the factors, of rank r₁·r₂. With Tucker cores, `t` (r, r,
*kernel), each of the two is the convolution Σ t[i, j] · w_a[i] ⊗ w_b[j], `w_a` lying transposed.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _pair(tensors: Tensors, number: int) -> tuple[Array, Array]:
    """Return one of the two products as factors (out, r) and (r, in·kernel)."""
    a, b = tensors[f"w{number}_a"], tensors[f"w{number}_b"]
    if f"t{number}" not in tensors:
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise tensors.wrong_shape(f"w{number}_b", f"({a.shape[-1]}, in)")
        return a, b
    core = tensors[f"t{number}"]
    if core.ndim < 3 or core.shape[:2] != (a.shape[0], b.shape[0]):
        raise tensors.wrong_shape(f"t{number}", f"({a.shape[0]}, {b.shape[0]}, *kernel)")
    spread = np.einsum("ij...,jp->ip...", core, b)
    return a.T, spread.reshape(len(core), -1)


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    (b1, a1), (b2, a2) = _pair(tensors, 1), _pair(tensors, 2)
    if len(b1) != len(b2) or a1.shape[1] != a2.shape[1]:
        raise tensors.wrong_shape("w2_a", "the shape of the first product")
    scale = delta.settings["scale"]
    shape = (len(b1), a1.shape[1])
    rank = b1.shape[1] * b2.shape[1]
    if rank > min(shape):
        return Rows(
            shape,
            lambda start, stop: scale * (b1[start:stop] @ a1) * (b2[start:stop] @ a2),
        )
    b = scale * (b1[:, :, None] * b2[:, None, :]).reshape(shape[0], rank)
    a = (a1[:, None, :] * a2[None, :, :]).reshape(rank, shape[1])
    return Product(b, a)


KIND = Kind(
    name="loha",
    title="LoHa",
    source="arXiv 2108.06098",
    parts=("w1_a", "w1_b", "w2_a", "w2_b"),
    optional=("t1", "t2"),
    form=_form,
)
