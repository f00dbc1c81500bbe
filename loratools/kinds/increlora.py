"""AdaLoRA as its authors save it, and IncreLoRA, whose factors grow piece by piece.

ΔW = α/(ranknum + 1e-5) · B @ (A ∘ E), the pieces of each joined in order (arXiv 2303.10512,
2308.12043). α is not in the file; ranknum is the number of rows in AdaLoRA, and that of the active
ones in IncreLoRA.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError

_LEAST_RANKNUM = 1e-5


def _joined(tensors: Tensors, delta: KindDelta, side: str, axis: int) -> Array:
    numbers = sorted(
        int(name.partition(".")[2]) for name in delta.parts if name.startswith(f"{side}.")
    )
    if not numbers or numbers != list(range(len(numbers))):
        raise AdapterError("pieces of a factor are missing", got=f"{side}: {numbers}")
    pieces = [tensors[f"{side}.{number}"] for number in numbers]
    if side == "e":
        return np.concatenate([piece.reshape(-1) for piece in pieces])
    return np.concatenate(pieces, axis=axis)


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b = _joined(tensors, delta, "a", 0), _joined(tensors, delta, "b", 1)
    e = _joined(tensors, delta, "e", 0)
    if e.size != len(a) or b.shape[1] != len(a):
        raise AdapterError(
            "factors do not fit together", got=f"A {list(a.shape)}, B {list(b.shape)}, {e.size} E"
        )
    scale = delta.settings["alpha"] / (delta.settings["ranknum"] + _LEAST_RANKNUM)
    return Product(scale * b, a * e.reshape(-1, 1))


KIND = Kind(
    name="increlora",
    title="AdaLoRA of its authors, IncreLoRA",
    source="arXiv 2308.12043",
    parts=(),
    optional=("a.*", "b.*", "e.*"),
    form=_form,
)
