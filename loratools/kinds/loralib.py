"""The original LoRA code: factors of linear layers, fused projections and convolutions.

ΔW = α/r · B @ A for linear layers and embeddings. A layer that fuses n projections adapts only
those that its constructor enabled: with e of them enabled, A is (e·r, in) and B (e·out/n, r), group
i of one belonging to group i of the other, and the outputs of projections that are not enabled do
not change. A convolution of k by k has A (r·k, in·k) and B (out·k, r·k), and its ΔW has the
elements of the product in the order of its weight (out, in, k, k): rows o·k + j of B, each times A,
lie one behind another in row o. Neither α nor which projections are enabled nor k is in the file.

Source: `Linear`, `Embedding`, `MergedLinear` and `ConvLoRA` of loralib 0.1.2. Its convolutions of
one or three dimensions work with k = 1 only, and those of several groups are not known here.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta, Layer
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors, settings = Tensors(delta), delta.settings
    a, b = tensors["a"], tensors["b"]
    kernel = settings.get("kernel", 1)
    rank = b.shape[1] // kernel
    groups = settings.get("groups")
    if groups is not None:
        b = _placed(a, b, groups)
    elif len(a) != b.shape[1]:
        raise tensors.wrong_shape("b", f"(out, {len(a)})")
    elif kernel != 1:
        sides = {
            "rows of A": len(a),
            "columns of A": a.shape[1],
            "rows of B": len(b),
            "columns of B": b.shape[1],
        }
        wrong = [side for side, length in sides.items() if length % kernel]
        if wrong:
            raise AdapterError(
                "factors are not those of a convolution",
                tensor=delta.parts["a"].key,
                got=f"{wrong[0]}: {sides[wrong[0]]}",
                expected=f"a multiple of kernel {kernel}",
            )
        b, a = b.reshape(len(b) // kernel, -1), np.kron(np.eye(kernel), a)
    return Product(settings["alpha"] / rank * b, a)


def _placed(a: Array, b: Array, groups: str) -> Array:
    """Return B (out, e·r) of a fused layer, each group's rows where its projection is."""
    rank = b.shape[1]
    enabled = [place for place, on in enumerate(groups) if on == "1"]
    if len(enabled) * rank != len(a) or len(b) % len(enabled):
        raise AdapterError(
            "the groups given do not fit the factors",
            got=f"{len(enabled)} enabled of {len(groups)}",
            expected=f"{len(a) // rank} enabled",
        )
    height = len(b) // len(enabled)
    whole = np.zeros((height * len(groups), len(a)))
    for index, place in enumerate(enabled):
        columns = slice(index * rank, (index + 1) * rank)
        whole[place * height : (place + 1) * height, columns] = b[
            index * height : (index + 1) * height
        ]
    return whole


def _completed(delta: KindDelta) -> KindDelta:
    a, b = (delta.parts[side].shape for side in "ab")
    kernel = delta.settings.get("kernel", 1)
    if kernel != 1:
        shape = (b[0] // kernel, a[1] * kernel)
        return replace(delta, layer=Layer("conv", kernel=(kernel, kernel)), shape=shape)
    groups = delta.settings.get("groups", "1")
    return replace(delta, shape=(b[0] // groups.count("1") * len(groups), a[1]))


KIND = Kind(
    name="loralib",
    title="LoRA of loralib",
    source="arXiv 2106.09685",
    parts=("a", "b"),
    form=_form,
    completed=_completed,
)
