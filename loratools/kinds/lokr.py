"""LoKr: a Kronecker product (KronA, arXiv 2212.10650; LyCORIS).

ΔW = scale · w1 ⊗ w2, either of which may be a product of two factors, and w2 of a convolution may
have a Tucker core. The scale is the reader's business: LyCORIS uses 1 where both are whole,
whatever alpha says, and PEFT always uses alpha/r.

PEFT lays a whole w2 (p, q, k) of a Conv1d beside w1 as if that were (1, out/p, in/q), and reshapes:
entry (i, j, t) of w2 and (m, n) of w1 meet at output i·(out/p) + m and, of the inputs, at
(j·(in/q) + n)·k + t. That is a Kronecker product with its columns in another order, and what such
adapters are trained with; its setting is `by_input`.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import (
    DeltaForm,
    Kind,
    Kronecker,
    Rows,
    Tensors,
    Weight,
    rows_in_groups,
)
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


def _side(tensors: Tensors, number: int) -> Array:
    """Return one of the two matrices, the kernel flattened into its columns."""
    whole, a, b, core = (f"w{number}{suffix}" for suffix in ("", "_a", "_b", "_t"))
    if whole in tensors:
        matrix = tensors[whole]
        return matrix.reshape(len(matrix), -1)
    if a not in tensors or b not in tensors:
        raise AdapterError(f"module lacks {whole}, or {a} and {b}")
    if core in tensors:
        spread: Array = np.einsum("ij...,ip,jr->pr...", tensors[core], tensors[a], tensors[b])
        return spread.reshape(len(spread), -1)
    left, right = tensors[a], tensors[b]
    if left.shape[1] != len(right):
        raise tensors.wrong_shape(b, f"({left.shape[1]}, …)")
    return left @ right.reshape(len(right), -1)


def _by_input(left: Array, whole: Array, scale: float) -> Rows:
    """Return rows of the change that PEFT makes of w1 (m, n) and w2 (p, q, k)."""
    (height, width), (outputs, inputs, kernel) = left.shape, whole.shape
    columns = inputs * width * kernel

    def of_outputs(first: int, last: int) -> Array:
        block: Array = np.einsum("ijt,mn->imjnt", scale * whole[first:last], left)
        return block.reshape(-1, columns)

    return Rows((outputs * height, columns), rows_in_groups(height, of_outputs))


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    if delta.settings.get("by_input"):
        return _by_input(_side(tensors, 1), tensors["w2"], delta.settings["scale"])
    return Kronecker(_side(tensors, 1), _side(tensors, 2), delta.settings["scale"])


KIND = Kind(
    name="lokr",
    title="LoKr",
    source="arXiv 2212.10650",
    parts=(),
    optional=("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "w2_t"),
    form=_form,
)
