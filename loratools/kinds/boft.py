"""BOFT: inputs are rotated by butterflies of blocks, then outputs are scaled (arXiv 2311.06243).

W' = s ∘ (W Rᵀ), R = Π Pᵢ diag(blocks of level i) Pᵢᵀ, each block the Cayley transform of the
skew-symmetric half of a stored matrix. Stored are R (levels, blocks, b, b) and s (out, 1). Source:
`BOFTLayer` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools.kinds.oft import cayley
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _permutation(size: int, blocks: int, radius: int, levels: int) -> Array:
    """Return the order in which level i's blocks read the inputs."""
    order = np.arange(size)
    if levels == 1:
        return order
    width = size // blocks
    steps = width // radius
    places = [*range(0, steps, 2), *range(1, steps, 2)]
    inside = np.concatenate([np.arange(p * radius, (p + 1) * radius) for p in places])
    return np.concatenate([start + inside for start in range(0, size, width)])


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    stored, gain, (out, in_) = tensors["blocks"], tensors["gain"].reshape(-1), weight.shape
    if stored.ndim != 4 or stored.shape[1] * stored.shape[2] != in_ or len(gain) != out:
        raise tensors.wrong_shape("blocks", f"(levels, n, b, b) with n·b = {in_}")
    levels, count, size, _ = stored.shape
    turns = [cayley(0.5 * (level - level.swapaxes(1, 2))) for level in stored]
    orders = [_permutation(in_, count // 2**i, size // 2, levels) for i in range(levels)]

    def rows(start: int, stop: int) -> Array:
        base = weight.rows(start, stop)
        moved = base
        for turn, order in zip(turns, orders, strict=True):
            # x (P D Pᵀ)ᵀ = ((x P) Dᵀ) Pᵀ, where P has a one at (i, order[i]).
            gathered = np.empty_like(moved)
            gathered[:, order] = moved
            parts = gathered.reshape(stop - start, count, size)
            rotated = np.einsum("onb,nab->ona", parts, turn, optimize=True)
            moved = rotated.reshape(stop - start, in_)[:, order]
        result: Array = gain[start:stop, None] * moved - base
        return result

    return Rows(weight.shape, rows)


KIND = Kind(
    name="boft",
    title="BOFT",
    source="arXiv 2311.06243",
    parts=("blocks", "gain"),
    needs="weight",
    low_rank=False,
    form=_form,
)
