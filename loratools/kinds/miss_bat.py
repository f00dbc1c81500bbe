"""MiSS in its `bat` form: every r×r block of W is multiplied by a matrix, which is added too.

ΔW[i, j] = W[i, j] @ block[i] + block[i] for block row i and block column j. Source:
`get_delta_weight` of miss in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight, rows_in_groups
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    block, (out, in_) = tensors["block"], weight.shape
    rank = block.shape[-1]
    if block.ndim != 3 or block.shape[1] != rank or out % rank or in_ % rank:
        raise tensors.wrong_shape("block", "(out/r, r, r)")
    if len(block) != out // rank:
        raise tensors.wrong_shape("block", f"({out // rank}, {rank}, {rank})")

    def of_blocks(first: int, last: int) -> Array:
        base = weight.rows(first * rank, last * rank).reshape(-1, rank, in_ // rank, rank)
        mats = block[first:last]
        moved: Array = np.einsum("iajb,ibc->iajc", base, mats)
        moved += mats[:, :, None, :]
        return moved.reshape((last - first) * rank, in_)

    return Rows(weight.shape, rows_in_groups(rank, of_blocks))


KIND = Kind(
    name="miss_bat",
    title="MiSS (bat)",
    source="arXiv 2409.15371",
    parts=("block",),
    needs="weight",
    low_rank=False,
    form=_form,
)
