"""OFT: blocks of inputs are rotated (arXiv 2306.07280, 2506.19847).

W' = W Rᵀ with R block-diagonal, each block from a skew-symmetric Q stored as its upper triangle:
the Cayley transform (I − Q)(I + Q)⁻¹ or its Neumann series of `terms` terms. In COFT, Q is first
shortened to a bound. Of an embedding, whose dimensions are rotated, W' = Rᵀ W with the vocabulary
as inputs. Source: `OFTRotationModule` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight, rows_in_groups
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def cayley(skew: Array) -> Array:
    """Return (I − Q)(I + Q)⁻¹ for a stack of skew-symmetric Q (n, b, b)."""
    eye = np.eye(skew.shape[-1])
    rotated = np.linalg.solve((eye + skew).swapaxes(-1, -2), (eye - skew).swapaxes(-1, -2))
    result: Array = rotated.swapaxes(-1, -2)
    return result


def cayley_neumann(skew: Array, terms: int) -> Array:
    """Return the series I + 2Q + 2Q² + … + Qᵗ⁻¹ that PEFT uses for (I + Q)(I − Q)⁻¹."""
    total = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    if terms > 1:
        total += 2.0 * skew
    if terms > 2:
        power = skew @ skew
        total += 2.0 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2.0 * power
        total += power @ skew
    return total


def skew_symmetric(triangles: Array, size: int) -> Array:
    """Return the stack (n, size, size) whose upper triangles are the rows of `triangles`."""
    result = np.zeros((len(triangles), size, size))
    rows, columns = np.triu_indices(size, 1)
    result[:, rows, columns] = triangles
    return result - result.swapaxes(1, 2)


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    triangles, settings = tensors["triangles"], delta.settings
    out, in_ = weight.shape
    rotated = out if delta.layer.kind == "embedding" else in_
    size = (1 + round((1 + 8 * triangles.shape[-1]) ** 0.5)) // 2
    if (
        triangles.ndim != 2
        or triangles.shape[1] * 2 != size * (size - 1)
        or size < 2
        or rotated % size
    ):
        raise tensors.wrong_shape("triangles", f"(blocks, b(b − 1)/2) for a divisor b of {rotated}")
    count = 1 if settings["shared"] else rotated // size
    if len(triangles) != count:
        raise tensors.wrong_shape("triangles", f"({count}, {size * (size - 1) // 2})")
    skew = skew_symmetric(triangles, size)
    if settings["bound"] is not None:
        bound = settings["bound"] / np.sqrt(len(triangles))
        norms = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew = np.where(norms <= bound, skew, bound * skew / np.maximum(norms, 1e-300))
    terms = settings["terms"]
    turns = cayley(skew) if terms is None else cayley_neumann(skew, terms)
    turns = np.broadcast_to(turns - np.eye(size), (rotated // size, size, size))

    def of_embedding(first: int, last: int) -> Array:
        base = weight.rows(first * size, last * size).reshape(-1, size, in_)
        changed: Array = np.einsum("nba,nbi->nai", turns[first:last], base, optimize=True)
        return changed.reshape(-1, in_)

    if delta.layer.kind == "embedding":
        return Rows(weight.shape, rows_in_groups(size, of_embedding))

    def rows(start: int, stop: int) -> Array:
        base = weight.rows(start, stop).reshape(stop - start, in_ // size, size)
        changed: Array = np.einsum("onb,nab->ona", base, turns, optimize=True)
        return changed.reshape(stop - start, in_)

    return Rows(weight.shape, rows)


KIND = Kind(
    name="oft",
    title="OFT",
    source="arXiv 2306.07280",
    parts=("triangles",),
    needs="weight",
    low_rank=False,
    form=_form,
)
