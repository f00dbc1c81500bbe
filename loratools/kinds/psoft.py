"""PSOFT: a rotation between the leading singular directions of the weight (arXiv 2505.11235).

ΔW = U_r diag(σ_r) (R − I) V_rᵀ, R from a triangle as in OFT, scaled on both sides; with `balanced`,
diag(σ) is split between the sides. R belongs to the signs of the singular vectors that training
had, which no file holds: those that torch finds on a CPU are taken, as PEFT does when it loads one
there. Source: `PsoftLayer` and `OrthLayer` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools.kinds.oft import cayley, cayley_neumann, skew_symmetric
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import MissingDependencyError


def _rotation(tensors: Tensors, delta: KindDelta) -> Array:
    settings, stored = delta.settings, tensors["matrix"]
    matrix: Array
    if settings["orthogonal"]:
        size = (1 + round((1 + 8 * stored.size) ** 0.5)) // 2
        rank = settings["rank"] or size
        if stored.ndim != 1 or stored.size * 2 != size * (size - 1) or size != rank:
            raise tensors.wrong_shape("matrix", f"({rank * (rank - 1) // 2},)")
        (skew,) = skew_symmetric(stored.reshape(1, -1), size)
        bound, terms = settings["bound"], settings["terms"]
        norm = np.linalg.norm(skew)
        if terms is not None and bound is not None and norm > bound:
            skew = skew * (bound / norm)
        matrix = cayley(-skew[None])[0] if terms is None else cayley_neumann(skew[None], terms)[0]
    else:
        matrix = stored
        if stored.ndim != 2:
            raise tensors.wrong_shape("matrix", "(r, r)")
    for side in ("left", "right"):
        if side in tensors and tensors[side].shape != matrix.shape[:1]:
            raise tensors.wrong_shape(side, f"({len(matrix)},)")
    if "left" in tensors:
        matrix = tensors["left"][:, None] * matrix
    if "right" in tensors:
        matrix = matrix * tensors["right"][None, :]
    return matrix


def _triplets(weight: Weight) -> tuple[Array, Array, Array]:
    """Return Uᵀ, the singular values and Vᵀ of the weight, as torch signs them on a CPU."""
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            "PSOFT refers to the singular vectors that torch computes", hint="pip install torch"
        ) from error
    whole = torch.from_numpy(weight.rows(0, weight.shape[0]).astype(np.float32))
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    return tuple(part.double().numpy() for part in (u.T, s, vt))


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    matrix = _rotation(tensors, delta)
    rank = len(matrix)
    if rank > min(weight.shape):
        raise tensors.wrong_shape("matrix", f"a rank of at most {min(weight.shape)}")
    u, s, vt = (part[:rank] for part in _triplets(weight))
    u = u.T
    moved = matrix - np.eye(rank)
    if delta.settings["balanced"]:
        root = np.sqrt(s)
        return Product(u * root, (moved * root) @ vt)
    return Product(u * s, moved @ vt)


KIND = Kind(
    name="psoft",
    title="PSOFT",
    source="arXiv 2505.11235",
    parts=("matrix",),
    optional=("left", "right"),
    needs="weight",
    form=_form,
    caution="the signs of singular vectors are not in a PSOFT file; they are taken as torch finds "
    "them on this machine's CPU, as PEFT would when it loads the adapter there",
)
