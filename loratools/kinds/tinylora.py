"""TinyLoRA: a few shared numbers choose the matrix between two fixed factors.

ΔW = B @ (Σ vᵢ Pᵢ) @ A, with A and B from an SVD of the base weight and P (u, r, r) fixed. Source:
`TinyLoraLayer` in peft 0.21.2.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools.kinds.numbers.random_stream import TorchStream
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import UnsupportedError

_SAME = 1e-3  # stored in half precision perhaps


def _group(delta: KindDelta, p: Array) -> int:
    """Return which of the shared vectors is the module's.

    The file does not say which module is which; but P was drawn from the seed plus the module's
    number, so the number is the one whose stream begins as P does.

    Raises:
        UnsupportedError: none of them does, or several do: P may be one number.
    """
    groups = sorted(int(name.removeprefix("v.")) for name in delta.shared)
    if len(groups) == 1:
        return groups[0]
    seed, count = delta.settings["seed"], delta.settings["count"]
    numbers = max(1, round(count * (1.0 - delta.settings["tying"])))
    size = max(1, count // numbers)
    deviation = 1.0 / math.sqrt(p.shape[1])
    found = {
        int(min(index // size, numbers - 1))
        for index in range(count)
        if np.abs(TorchStream(seed + index).normal(p.shape, deviation) - p).max() < _SAME
    }
    if len(found) == 1:
        return found.pop()
    raise UnsupportedError(
        "it is not known which of the shared vectors belongs to the module",
        got=f"{len(groups)} vectors, of which {len(found)} could",
    )


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    a, b, p = tensors["a"], tensors["b"], tensors["p"]
    v = tensors[f"v.{_group(delta, p)}"]
    if p.shape != (len(v), b.shape[1], len(a)):
        raise tensors.wrong_shape("p", f"({len(v)}, {b.shape[1]}, {len(a)})")
    middle = np.tensordot(v, p, axes=1)
    if delta.layer.kind == "embedding":  # factored in the stored layout, the vocabulary first
        return Product(a.T, (b @ middle).T)
    return Product(b, middle @ a)


KIND = Kind(
    name="tinylora",
    title="TinyLoRA",
    source="peft TinyLoraLayer",
    parts=("a", "b", "p"),
    optional=("v.*",),
    form=_form,
)
