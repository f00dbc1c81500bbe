"""Intruder dimensions of W + ΔW, and where ΔW acts on W's spectrum.

A leading left singular vector u of W + ΔW intrudes if max_i |cos(u, uᵢ)| < ε over all left singular
vectors uᵢ of W. Source: "LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228.

Two ways. With W's SVD, W + ΔW is, in W's singular bases extended by what ΔW has outside of them, a
diagonal matrix plus one of ΔW's rank; the coordinates of its singular vectors are the cosines.
Without it, the leading triplets of both come from block Krylov spaces, and a vector is judged by
bounds: it does not intrude if a known uᵢ is within ε; it does if no uᵢ at all can be. The latter
follows from the spectral measure of u under WWᵀ, Σ cᵢ² δ(σᵢ²): by the Chebyshev–Markov–Stieltjes
inequality, no point has more mass than the Christoffel function 1/Σ pₖ(λ)² of its first orthonormal
polynomials, which a few steps of Lanczos from u give. What neither settles is undetermined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratools.algebra.thin import Thin
from loratools_formats.core.dtypes import Array

Verdict = Literal["intruder", "not", "undetermined"]

_TOLERANCE = 1e-10  # of the residual of a singular triplet, over σ₁
_CERTIFIED_TOLERANCE = 1e-7
_LANCZOS_STEPS = 60
_GRID = 24  # points between two nodes of the Christoffel function


@dataclass(frozen=True)
class BaseSvd:
    """W = u @ diag(s) @ vt with p = min(out, in).

    Attributes:
        u: (out, p).
        s: (p,), descending.
        vt: (p, in).
    """

    u: Array
    s: Array
    vt: Array


@dataclass(frozen=True)
class Leading:
    """Leading singular triplets of W + ΔW, and bounds on their cosines with W's.

    Attributes:
        u: (out, k).
        s: (k,), descending.
        vt: (k, in).
        cosines: (k,): the largest |cos| with a left singular vector of W; where that is not known,
            the largest with one of those that are.
        verdicts: of each.
    """

    u: Array
    s: Array
    vt: Array
    cosines: Array
    verdicts: tuple[Verdict, ...]

    @property
    def intruders(self) -> list[int]:
        """Indices of the vectors that intrude."""
        return [j for j, verdict in enumerate(self.verdicts) if verdict == "intruder"]


def base_svd(weight: Array) -> BaseSvd:
    """Return the whole SVD of a weight in float64."""
    return BaseSvd(*np.linalg.svd(weight.astype(np.float64, copy=False), full_matrices=False))


def in_base(base: BaseSvd, delta: Thin, count: int, epsilon: float) -> Leading:
    """Return the leading triplets of W + ΔW from W's SVD and ΔW's factors, with exact cosines.

    Args:
        base: W's SVD.
        delta: ΔW, a product.
        count: how many triplets, k.
        epsilon: ε.
    """
    b = delta.scale * delta.b.astype(np.float64, copy=False)
    a = delta.a.astype(np.float64, copy=False)
    inside_b, inside_a = base.u.T @ b, a @ base.vt.T
    q_left, r_left = np.linalg.qr(b - base.u @ inside_b)
    q_right, r_right = np.linalg.qr((a - inside_a @ base.vt).T)
    left = np.concatenate([inside_b, r_left])
    right = np.concatenate([inside_a, r_right.T], axis=1)
    diagonal = base.s
    size = len(diagonal)

    def forward(x: Array) -> Array:
        y: Array = left @ (right @ x)
        y[:size] += diagonal[:, None] * x[:size]
        return y

    def backward(y: Array) -> Array:
        x: Array = right.T @ (left.T @ y)
        x[:size] += diagonal[:, None] * y[:size]
        return x

    u, s, vt = leading_triplets(forward, backward, (len(left), right.shape[1]), count)
    cosines = np.abs(u[:size]).max(axis=0)
    verdicts: tuple[Verdict, ...] = tuple("intruder" if c < epsilon else "not" for c in cosines)
    whole_u = base.u @ u[:size] + q_left @ u[size:]
    whole_vt = vt[:, :size] @ base.vt + vt[:, size:] @ q_right.T
    return Leading(whole_u, s, whole_vt, cosines, verdicts)


def merged_in_base(base: BaseSvd, merged: Array, count: int, epsilon: float) -> Leading:
    """Return the leading triplets of W' of any form, with exact cosines by W's SVD.

    Args:
        base: W's SVD.
        merged: W' (out, in), such as m/‖W + BA‖ ⊙ (W + BA).
        count: how many triplets, k.
        epsilon: ε.
    """
    u, s, vt = leading_triplets(lambda x: merged @ x, lambda y: merged.T @ y, merged.shape, count)
    cosines = np.abs(base.u.T @ u).max(axis=0)
    verdicts: tuple[Verdict, ...] = tuple("intruder" if c < epsilon else "not" for c in cosines)
    return Leading(u, s, vt, cosines, verdicts)


def certified(weight: Array, delta: Thin, count: int, epsilon: float) -> Leading:
    """Return the leading triplets of W + ΔW and judge them by bounds, without W's SVD.

    Args:
        weight: W (out, in).
        delta: ΔW, a product.
        count: how many triplets, k.
        epsilon: ε.
    """
    b = (delta.scale * delta.b).astype(weight.dtype, copy=False)
    a = delta.a.astype(weight.dtype, copy=False)
    triplets = leading_triplets(
        lambda x: weight @ x + b @ (a @ x),
        lambda y: weight.T @ y + a.T @ (b.T @ y),
        weight.shape,
        count,
        _CERTIFIED_TOLERANCE,
    )
    return _certified(weight, triplets, epsilon)


def merged_certified(weight: Array, merged: Array, count: int, epsilon: float) -> Leading:
    """Return the leading triplets of W' of any form and judge them by bounds.

    Args:
        weight: W (out, in).
        merged: W' (out, in).
        count: how many triplets, k.
        epsilon: ε.
    """
    triplets = leading_triplets(
        lambda x: merged @ x, lambda y: merged.T @ y, merged.shape, count, _CERTIFIED_TOLERANCE
    )
    return _certified(weight, triplets, epsilon)


def _certified(weight: Array, triplets: tuple[Array, Array, Array], epsilon: float) -> Leading:
    u, s, vt = triplets
    known, _, _ = leading_triplets(
        lambda x: weight @ x,
        lambda y: weight.T @ y,
        weight.shape,
        2 * len(s),
        _CERTIFIED_TOLERANCE,
    )
    overlaps = known.T @ u
    cosines = np.abs(overlaps).max(axis=0)
    verdicts: list[Verdict] = []
    reach: Array | None = None
    for j, cosine in enumerate(cosines):
        if cosine >= epsilon:
            verdicts.append("not")
        elif 1.0 - float(overlaps[:, j] @ overlaps[:, j]) < epsilon**2:
            verdicts.append("intruder")
        else:
            if reach is None:
                reach = _in_range(weight, u)
            bound = largest_atom(lambda x: weight @ (weight.T @ x), reach[:, j], epsilon**2)
            verdicts.append("intruder" if bound < epsilon**2 else "undetermined")
    return Leading(u, s, vt, cosines, tuple(verdicts))


def leading_triplets(
    forward: Callable[[Array], Array],
    backward: Callable[[Array], Array],
    shape: tuple[int, int],
    count: int,
    tolerance: float = _TOLERANCE,
) -> tuple[Array, Array, Array]:
    """Return the leading singular triplets of an operator by block Krylov spaces, to convergence.

    The space grows, kept orthonormal, until every residual ‖Xᵀu − σv‖ is below tolerance·σ₁, or
    until it is the whole space, where the result is exact. Source: Musco, Musco, arXiv 1504.05477.

    Args:
        forward: x (in, p) ↦ X x.
        backward: y (out, p) ↦ Xᵀ y.
        shape: (out, in).
        count: how many, k.
        tolerance: of the residuals, over σ₁.

    Returns:
        u (out, k), s (k,), vt (k, in).
    """
    rows, columns = shape
    count = min(count, rows, columns)
    width = min(count + 6, columns)
    rng = np.random.default_rng(0)
    block = _outside(rng.standard_normal((columns, width)), np.empty((columns, 0)))
    spaces, images, size, next_look = [], [], 0, 3 * width
    while True:
        spaces.append(block)
        images.append(forward(block))
        size += block.shape[1]
        if size >= min(next_look, columns):
            space = np.concatenate(spaces, axis=1)
            u, s, small = np.linalg.svd(np.concatenate(images, axis=1), full_matrices=False)
            u, s, vt = u[:, :count], s[:count], small[:count] @ space.T
            residuals = np.linalg.norm(backward(u) - vt.T * s, axis=0)
            if size >= columns or residuals.max(initial=0.0) <= tolerance * s[0]:
                return u, s, vt
            next_look = int(1.3 * size)
        room = columns - size
        block = backward(images[-1])
        sizes = np.linalg.norm(block, axis=0)
        if not (sizes > 1e-12 * sizes.max(initial=0.0)).all() or sizes.max() == 0.0:
            block = rng.standard_normal((columns, block.shape[1]))
        block = _outside(block, np.concatenate(spaces, axis=1))[:, :room]


def _outside(block: Array, space: Array) -> Array:
    """Return orthonormal columns that span what a block has outside of a space."""
    for _ in range(3):
        block = block - space @ (space.T @ block)
        block, _ = np.linalg.qr(block)
    return block


def _in_range(weight: Array, u: Array) -> Array:
    """Return the parts of vectors that combinations of W's columns can be.

    The rest is orthogonal to every left singular vector, and would be one large atom at zero.
    """
    if weight.shape[0] <= weight.shape[1]:
        return u
    q, _ = np.linalg.qr(weight)
    inside: Array = q @ (q.T @ u)
    return inside


def largest_atom(apply: Callable[[Array], Array], start: Array, enough: float) -> float:
    """Return an upper bound on the squared cosine of a vector with any eigenvector.

    Args:
        apply: x ↦ H x of a positive semidefinite H.
        start: (n,), of norm at most 1.
        enough: stop as soon as the bound is below this.
    """
    mass = float(start @ start)
    if mass < enough:
        return mass
    basis = [start / np.sqrt(mass)]
    alphas: list[float] = []
    betas: list[float] = []
    bound = 1.0
    for step in range(min(_LANCZOS_STEPS, len(start) - 1)):
        y = apply(basis[-1])
        alphas.append(float(y @ basis[-1]))
        stacked = np.stack(basis)
        for _ in range(2):
            y = y - stacked.T @ (stacked @ y)
        beta = float(np.linalg.norm(y))
        if beta <= 1e-10 * max(abs(alphas[0]), 1e-300):
            # The space is closed: the measure is known, and its atoms are exact.
            jacobi = np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)
            return mass * float((np.linalg.eigh(jacobi)[1][0] ** 2).max())
        betas.append(beta)
        basis.append(y / beta)
        if step % 5 == 4:
            bound = mass * _christoffel_maximum(np.array(alphas), np.array(betas))
            if bound < enough:
                break
    return bound


def _christoffel_maximum(alphas: Array, betas: Array) -> float:
    """Return max over λ of 1/Σ pₖ(λ)² of the orthonormal polynomials p₀ … pₙ.

    Outside of the nodes every polynomial grows, so the maximum lies between the outermost; there
    it is taken on a fine grid around and between all nodes.
    """
    jacobi = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    nodes = np.linalg.eigvalsh(jacobi)
    span = float(nodes[-1] - nodes[0]) or 1.0
    edges = np.concatenate([[nodes[0] - 0.1 * span], nodes, [nodes[-1] + 0.1 * span]])
    shares = (1.0 - np.cos(np.linspace(0.0, np.pi, _GRID, endpoint=False))) / 2.0
    grid = (edges[:-1, None] + np.diff(edges)[:, None] * shares).reshape(-1)
    before, now = np.zeros_like(grid), np.ones_like(grid)
    total = now**2
    for k, (alpha, beta) in enumerate(zip(alphas, betas, strict=True)):
        after = ((grid - alpha) * now - (betas[k - 1] if k else 0.0) * before) / beta
        before, now = now, after
        total += now**2
    return float((1.0 / total).max())


def amplification(weight: Array, delta: Thin) -> float | None:
    """Return ‖ΔW‖_F / ‖UᵀWV‖_F for U, V the singular bases of ΔW (arXiv 2106.09685, §7.3).

    None if ΔW is zero, or lies where W is.
    """
    u, v = delta.spaces()
    inside = float(np.linalg.norm(u.T @ (weight @ v)))
    return float(np.sqrt(delta.squared_norm)) / inside if inside > 0.0 and u.size else None
