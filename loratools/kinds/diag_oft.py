"""OFT of LyCORIS and sd-scripts: blocks of outputs are rotated, then outputs may be scaled.

W' = s ∘ (R W), R block-diagonal with blocks ((I + Q)(I − Q)⁻¹)ᵀ, Q = X − Xᵀ of the stored blocks X
(n, b, b), shortened to `constraint` if that is set, which is what alpha means here. PEFT's OFT
rotates inputs and stores triangles: see `oft`. Source: `DiagOFTModule` in lycoris-lora 4.1.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight, rows_in_groups
from loratools.kinds.oft import cayley
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def rotations(blocks: Array, constraint: float) -> Array:
    """Return (I + Q)(I − Q)⁻¹ for a stack of stored blocks (…, b, b).

    Args:
        blocks: X.
        constraint: the longest that all of Q may be; 0 for no limit.
    """
    skew = blocks - blocks.swapaxes(-1, -2)
    length = float(np.linalg.norm(skew))
    if 0.0 < constraint < length:
        skew = skew * (constraint / length)
    return cayley(-skew)


def gains(tensors: Tensors, out: int) -> Array:
    """Return the factor of each output, 1 where none is stored: (out, 1).

    Raises:
        AdapterError: there are more or fewer.
    """
    if "gain" not in tensors:
        return np.ones((out, 1))
    found = tensors["gain"].reshape(-1, 1)
    if len(found) != out:
        raise tensors.wrong_shape("gain", f"{out} numbers")
    return found


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    blocks, out = tensors["blocks"], weight.shape[0]
    if (
        blocks.ndim != 3
        or blocks.shape[1] != blocks.shape[2]
        or len(blocks[0]) * len(blocks) != out
    ):
        raise tensors.wrong_shape("blocks", f"(n, b, b) with n·b = {out}")
    size = blocks.shape[1]
    turns = rotations(blocks, delta.settings["constraint"]).swapaxes(-1, -2)
    gain = gains(tensors, out)

    def of_blocks(first: int, last: int) -> Array:
        base = weight.rows(first * size, last * size)
        moved = turns[first:last] @ base.reshape(last - first, size, -1)
        changed: Array = gain[first * size : last * size] * moved.reshape(base.shape) - base
        return changed

    return Rows(weight.shape, rows_in_groups(size, of_blocks))


KIND = Kind(
    name="diag_oft",
    title="OFT of LyCORIS",
    source="arXiv 2306.07280",
    parts=("blocks",),
    optional=("gain",),
    needs="weight",
    low_rank=False,
    form=_form,
)
