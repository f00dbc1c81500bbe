"""DEFT, and PaRa: a subspace of outputs is emptied, and filled anew (peft 0.21.2, `DeftLinear`).

ΔW = Q (scale · R − Pᵣᵀ W), of rank r: with `qr`, Q = Pᵣ is an orthonormal basis of P's columns,
with `relu`, Q is P and Pᵣ its positive part. PaRa has no R.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.disk.errors import UnsupportedError


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    p, method = tensors["p"], delta.settings["method"]
    if p.ndim != 2 or len(p) != weight.shape[0]:
        raise tensors.wrong_shape("p", f"({weight.shape[0]}, r)")
    if method == "qr":
        q, _ = np.linalg.qr(p)
        right = q
    elif method == "relu":
        q, right = p, np.maximum(p, 0.0)
    else:
        raise UnsupportedError("decomposition of DEFT is not known", got=method)
    removed = np.zeros((p.shape[1], weight.shape[1]))
    for start, stop in row_spans(weight.shape):
        removed += right[start:stop].T @ weight.rows(start, stop)
    filled = delta.settings["scale"] * tensors["r"] if "r" in tensors else 0.0
    return Product(q, filled - removed)


KIND = Kind(
    name="deft",
    title="DEFT",
    source="peft DeftLinear",
    parts=("p",),
    optional=("r",),
    needs="weight",
    form=_form,
)
