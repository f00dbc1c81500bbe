"""BOFT of LyCORIS: outputs are rotated by butterflies of blocks, then may be scaled.

W' = s ∘ (Rₘ … R₁ W). Level i gathers outputs k = 2ⁱ·b/2 apart in pairs, rotates blocks of b of them
by (I + Q)(I − Q)⁻¹, and puts them back. Stored are X (m, n, b, b) as for `diag_oft`, of which Q is
made over all levels together. PEFT's BOFT rotates inputs: see `boft`. A level reaches across all
outputs, so that the weight is held whole. Source: `functional/boft.py` in lycoris-lora 4.1.
"""

from __future__ import annotations

import functools

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools.kinds.diag_oft import gains, rotations
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _order(out: int, apart: int) -> Array:
    """Return the order in which a level reads outputs: pairs `apart` from each other together."""
    return np.arange(out).reshape(-1, 2, apart).swapaxes(1, 2).reshape(-1)


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    blocks, out = tensors["blocks"], weight.shape[0]
    if (
        blocks.ndim != 4
        or blocks.shape[2] != blocks.shape[3]
        or blocks.shape[1] * blocks.shape[2] != out
    ):
        raise tensors.wrong_shape("blocks", f"(levels, n, b, b) with n·b = {out}")
    levels, count, size, _ = blocks.shape
    if out % (2**levels * (size // 2)):
        raise tensors.wrong_shape("blocks", f"levels that divide {out} outputs")
    turns = rotations(blocks, delta.settings["constraint"])
    gain = gains(tensors, out)

    @functools.cache
    def whole() -> Array:
        base = np.concatenate([weight.rows(*span) for span in row_spans(weight.shape)])
        moved = base
        for level in range(levels):
            order = _order(out, 2**level * (size // 2))
            rotated = turns[level] @ moved[order].reshape(count, size, -1)
            moved = np.empty_like(base)
            moved[order] = rotated.reshape(base.shape)
        result: Array = gain * moved - base
        return result

    return Rows(weight.shape, lambda start, stop: whole()[start:stop])


KIND = Kind(
    name="butterfly_oft",
    title="BOFT of LyCORIS",
    source="arXiv 2311.06243",
    parts=("blocks",),
    optional=("gain",),
    needs="weight",
    low_rank=False,
    form=_form,
)
