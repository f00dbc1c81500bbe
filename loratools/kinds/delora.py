"""DeLoRA: terms of unit length, one strength, the base's column norms (arXiv 2503.18225).

ΔW = B @ diag(λ/(r·‖Aᵢ‖·‖Bᵢ‖)) @ A ∘ w_norm, the norms no smaller than 1e-4. The column norms of the
base are stored. Source: `DeloraLayer._compute_delta` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta

_LEAST_NORM = 1e-4


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, w_norm = tensors["a"], tensors["b"], tensors["w_norm"]
    if b.shape[1] != len(a) or w_norm.shape != a.shape[1:]:
        raise tensors.wrong_shape("w_norm", f"({a.shape[1]},)")
    lengths = np.maximum(np.linalg.norm(a, axis=1), _LEAST_NORM)
    lengths *= np.maximum(np.linalg.norm(b, axis=0), _LEAST_NORM)
    strength = tensors["lambda"].reshape(-1)[0] / len(a)
    return Product(b * (strength / lengths), a * w_norm)


KIND = Kind(
    name="delora",
    title="DeLoRA",
    source="arXiv 2503.18225",
    parts=("a", "b", "lambda", "w_norm"),
    form=_form,
)
