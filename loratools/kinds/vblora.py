"""VB-LoRA: factors composed of the vectors of one bank (arXiv 2405.15179).

Every stretch of `bank.shape[1]` numbers of a factor is a mixture of bank vectors, by the softmax of
the largest `topk` logits: A from logits (r, in/b, h), B from (out/b, r, h), and ΔW = B @ A. Files
may hold the chosen indices and all weights but the last instead.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


def _mixture(tensors: Tensors, side: str, topk: int) -> Array:
    """Return the composed vectors, one axis more than the logits' first two."""
    bank = tensors["bank"]
    if f"logits_{side}" in tensors:
        logits = tensors[f"logits_{side}"]
        if logits.ndim != 3 or logits.shape[2] != len(bank) or topk > len(bank):
            raise tensors.wrong_shape(f"logits_{side}", f"(…, …, {len(bank)})")
        indices = np.argsort(-logits, axis=-1, kind="stable")[..., :topk]
        chosen = np.take_along_axis(logits, indices, axis=-1)
        weights = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
    elif f"indices_{side}" in tensors and f"weights_{side}" in tensors:
        indices, first = tensors.integers(f"indices_{side}"), tensors[f"weights_{side}"]
        weights = np.concatenate([first, 1.0 - first.sum(axis=-1, keepdims=True)], axis=-1)
        if weights.shape != indices.shape or indices.max() >= len(bank):
            raise tensors.wrong_shape(f"indices_{side}", f"indices below {len(bank)}")
    else:
        raise AdapterError(f"module lacks logits_{side}, or indices_{side} and weights_{side}")
    mixture: Array = (weights[..., None] * bank[indices]).sum(axis=-2)
    return mixture


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a = _mixture(tensors, "a", delta.settings["topk"])
    b = _mixture(tensors, "b", delta.settings["topk"])
    if len(a) != b.shape[1]:
        raise AdapterError("the logits have different ranks", got=f"{len(a)} and {b.shape[1]}")
    return Product(b.transpose(0, 2, 1).reshape(-1, b.shape[1]), a.reshape(len(a), -1))


KIND = Kind(
    name="vblora",
    title="VB-LoRA",
    source="arXiv 2405.15179",
    parts=("bank",),
    optional=("logits_a", "logits_b", "indices_a", "indices_b", "weights_a", "weights_b"),
    form=_form,
)
