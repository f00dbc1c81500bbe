"""Factor-space algebra: what can be known of ΔW = scale · b @ a without forming it.

Written against the array API, so NumPy arrays (the CPU engine) and torch tensors on a device go
through the same code. Nothing here knows about files, layers or formats.

Two routes to the singular values of a product: thin QR of both factors, exact to rounding, and
Gram matrices in float64, several times faster, with a floor of about 1e-8 of the largest singular
value, which is below every rounding of a stored factor.

Shapes: `b: (out, r)`, `a: (r, in)`, both real floating; results are float64 unless the device has
none (MPS), where they are float32.

Sources: Halko, Martinsson, Tropp, arXiv 0909.4061 (randomised SVD); algebra of products of thin
factors is textbook.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any

_BLOCK_ROWS = 1024  # what is widened stays in the cache, and its memory is used again
_BLOCK_ELEMENTS = 1 << 17
_SINGLE_ROWS = 4096
_ROWS_AT_ONCE = 16
_BALANCED = 8.0  # powers of two between the sizes of columns and rows that Gram matrices bear


def namespace(x: Array) -> Any:
    """Return the array-API namespace of an array: NumPy itself, or torch's compat layer."""
    if isinstance(x, np.ndarray):
        return np
    import array_api_compat

    return array_api_compat.array_namespace(x)


def wide(x: Array) -> Any:
    """Return the type to compute in: float64 where the array's device has it."""
    xp = namespace(x)
    return xp.float32 if str(getattr(x, "device", "")).startswith("mps") else xp.float64


def widened(x: Array) -> Array:
    """Return the array in the type to compute in, itself if it has that."""
    return namespace(x).astype(x, wide(x), copy=False)


def gram(x: Array, y: Array | None = None) -> Array:
    """Return xᵀ @ y in float64 (xᵀ @ x without y), taking blocks of rows.

    Args:
        x: (n, p).
        y: (n, q).

    Returns:
        (p, q).
    """
    total = None
    height = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(x.shape[1], 1))
    for start in range(0, x.shape[0], height):
        left = widened(x[start : start + height, :])
        right = left if y is None else widened(y[start : start + height, :])
        part = left.T @ right
        total = part if total is None else total + part
    return total


def gram_in_single(x: Array) -> Array:
    """Return xᵀ @ x in float64, from products in float32 over blocks of rows.

    Twice as fast as `gram`. Each entry is off by about 1e-7 of the norms of both columns; what
    float32 cannot hold is summed as `gram` does.

    Args:
        x: (n, p).
    """
    total = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, x.shape[0], _SINGLE_ROWS):
        part = x[start : start + _SINGLE_ROWS, :].astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            total += part.T @ part
    return total if np.isfinite(total).all() else gram(x)


def inner(b1: Array, a1: Array, b2: Array, a2: Array) -> float:
    """Return the Frobenius inner product ⟨b1 @ a1, b2 @ a2⟩ = Σ (b1ᵀb2) ∘ (a1a2ᵀ)."""
    xp = namespace(b1)
    return float(xp.sum(gram(b1, b2) * gram(a1.T, a2.T)))


@dataclass(frozen=True)
class Grams:
    """Both Gram matrices of a product: `b: bᵀb (r, r)`, `a: aaᵀ (r, r)`."""

    b: Array
    a: Array

    @property
    def squared_norm(self) -> float:
        """‖b @ a‖²_F."""
        squared = float(namespace(self.b).sum(self.b * self.a))
        return max(squared, 0.0)

    def scaled(self, weights: Array) -> Grams:
        """Return those of the same product, b's columns times and a's rows over weights: (r,)."""
        across = weights[:, None] * weights
        return Grams(self.b * across, self.a / across)


def grams(b: Array, a: Array) -> Grams:
    """Return the Gram matrices of a product's factors."""
    return Grams(gram(b), gram(a.T))


@dataclass(frozen=True)
class GramCore:
    """The core of an SVD by Gram matrices.

    Attributes:
        singular_values: (r,), descending.
        to_b: (r, r); U·√S = b @ to_b.
        to_a: (r, r); √S·Vᵀ = to_a @ a.
    """

    singular_values: Array
    to_b: Array
    to_a: Array


def gram_core(both: Grams, scale: float) -> GramCore:
    """Decompose scale · b @ a from its Gram matrices.

    With bᵀb = LLᵀ, the matrix M = scale² · Lᵀ(aaᵀ)L has the squared singular values as its
    eigenvalues; its eigenvectors give both new factors without inverting anything but singular
    values. Directions below the floor of the method come out as zeros.
    """
    alive = _alive(both)
    if alive is not None:
        core = gram_core(
            Grams(both.b * alive * alive[:, None], both.a * alive * alive[:, None]), scale
        )
        return GramCore(core.singular_values, alive[:, None] * core.to_b, core.to_a * alive)
    weights = _balance(both)
    if weights is not None:
        core = gram_core(both.scaled(weights), scale)
        return GramCore(core.singular_values, weights[:, None] * core.to_b, core.to_a / weights)
    xp = namespace(both.b)
    root = _root(both.b)
    squares, u = xp.linalg.eigh(scale * scale * (root.T @ both.a @ root))
    squares = xp.clip(xp.flip(squares, axis=0), 0.0, None)
    u = xp.flip(u, axis=1)
    s = xp.sqrt(squares)
    # eigh resolves eigenvalues to ε times the largest; below that their square roots are noise.
    floor = float(s[0]) * math.sqrt(s.shape[0] * float(xp.finfo(s.dtype).eps))
    s = xp.where(s > floor, s, xp.zeros_like(s))
    kept = xp.where(s > 0.0, s, xp.ones_like(s))
    inverse_root = xp.where(s > 0.0, 1.0 / xp.sqrt(kept), xp.zeros_like(s))
    lifted = root @ u
    to_a = scale * (lifted * inverse_root).T
    to_b = scale * scale * (both.a @ lifted) * inverse_root / kept
    return GramCore(s, to_b, to_a)


def _alive(both: Grams) -> Array | None:
    """Return 1 where a column of b and its row of a both have a size, else 0: (r,).

    A row of a beside a column of zeros adds nothing, but may be so large that what rounding leaves
    of the column drowns the others.

    Returns:
        None if there is nothing to leave out.
    """
    xp = namespace(both.b)
    of_b, of_a = xp.linalg.diagonal(both.b), xp.linalg.diagonal(both.a)
    dead = (of_b == 0.0) != (of_a == 0.0)
    if not bool(xp.any(dead)):
        return None
    return xp.where(dead, xp.zeros_like(of_b), xp.ones_like(of_b))


def _balance(both: Grams) -> Array | None:
    """Return powers of two by which columns of b grow, and rows of a shrink, to like sizes: (r,).

    Where large columns of b belong to small rows of a, rounding of the one would drown the other.

    Returns:
        None if the sizes that they have are not so far apart as to matter.
    """
    xp = namespace(both.b)
    of_b, of_a = xp.linalg.diagonal(both.b), xp.linalg.diagonal(both.a)
    is_there = (of_b > 0.0) & (of_a > 0.0)
    ones = xp.ones_like(of_b)
    a, b = xp.where(is_there, of_a, ones), xp.where(is_there, of_b, ones)
    powers = xp.round(0.25 * (xp.log2(a) - xp.log2(b)))
    usual = powers[is_there]
    if usual.shape[0] == 0:
        return None
    apart = float(xp.max(usual) - xp.min(usual))
    if not (math.isfinite(apart) and apart > _BALANCED):
        return None
    middle = xp.round(0.5 * (xp.max(usual) + xp.min(usual)))
    return xp.where(is_there, 2.0 ** (powers - middle), ones)


def _root(gram: Array) -> Array:
    """Return L with LLᵀ = gram, which has no negative eigenvalues but for rounding."""
    xp = namespace(gram)
    if isinstance(gram, np.ndarray):
        with contextlib.suppress(np.linalg.LinAlgError):
            return np.linalg.cholesky(gram)  # a tenth of the time of its eigenvectors
    values, vectors = xp.linalg.eigh(gram)
    return vectors * xp.sqrt(xp.clip(values, 0.0, None))


@dataclass(frozen=True)
class Factors:
    """Canonical factors: `b = U·√S: (out, k)`, `a = √S·Vᵀ: (k, in)`, `b @ a` of scale 1.

    Attributes:
        b: left factor.
        a: right factor.
        singular_values: (k,), descending.
    """

    b: Array
    a: Array
    singular_values: Array


def _sign_fixed(b: Array, a: Array, singular_values: Array) -> Factors:
    """Make the largest entry of each column of b positive, so that equal ΔW give equal files.

    Changes both arrays in place; they are fresh here, and a copy costs as much as the product.
    """
    xp = namespace(b)
    if b.shape[1] == 0:
        return Factors(b, a, singular_values)
    least, largest = _extremes(b)
    negative = -least > largest
    signs = xp.where(negative, -xp.ones_like(b[0, :]), xp.ones_like(b[0, :]))
    b *= signs
    a *= signs[:, None]
    return Factors(b, a, singular_values)


def _extremes(b: Array) -> tuple[Array, Array]:
    """Return the least and the largest entry of each column, several rows side by side at once.

    Reducing few columns row by row takes six times as long.
    """
    xp = namespace(b)
    rows, columns = b.shape
    whole = rows - rows % _ROWS_AT_ONCE
    blocks = [b[whole:, :]] if whole < rows else []
    if whole:
        blocks.append(xp.reshape(b[:whole, :], (-1, _ROWS_AT_ONCE * columns)))
    found = []
    for extreme in (xp.min, xp.max):
        parts = [xp.reshape(extreme(block, axis=0), (-1, columns)) for block in blocks]
        found.append(extreme(xp.concat(parts, axis=0), axis=0))
    return found[0], found[1]


def gram_factors(b: Array, a: Array, core: GramCore, rank: int) -> Factors:
    """Return the best factors of a rank, from a core already computed for the same b and a."""
    xp = namespace(b)
    to_b, to_a = core.to_b[:, :rank], core.to_a[:rank, :]
    new_b = xp.concat([widened(b[span, :]) @ to_b for span in _spans(b)], axis=0)
    new_a = xp.concat([to_a @ widened(a[:, span]) for span in _spans(a.T)], axis=1)
    return _sign_fixed(new_b, new_a, core.singular_values[:rank])


def _spans(x: Array) -> list[slice]:
    """Return blocks of rows that fit into the cache when they are widened; all of what is wide."""
    rows, columns = x.shape
    height = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(columns, 1))
    if x.dtype == wide(x):
        height = max(rows, 1)
    return [slice(start, start + height) for start in range(0, max(rows, 1), height)]


def qr_factors(b: Array, a: Array, scale: float, rank: int) -> Factors:
    """Return the best factors of a rank by thin QR of both factors and an SVD of their core."""
    xp = namespace(b)
    q_b, r_b = xp.linalg.qr(widened(b))
    q_a, r_a = xp.linalg.qr(widened(a.T))
    u, s, vt = xp.linalg.svd(scale * (r_b @ r_a.T), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank, :]
    root = xp.sqrt(s)
    return _sign_fixed(q_b @ (u * root), (root[:, None] * vt) @ q_a.T, s)


def concatenate(terms: list[tuple[float, Array, Array]]) -> tuple[Array, Array]:
    """Return one pair of factors for Σ scaleᵢ · bᵢ @ aᵢ, of rank Σ rᵢ.

    Args:
        terms: (scale, b (out, rᵢ), a (rᵢ, in)) each.
    """
    xp = namespace(terms[0][1])
    b = xp.concat([scale * widened(b) for scale, b, _ in terms], axis=1)
    a = xp.concat([widened(a) for _, _, a in terms], axis=0)
    return b, a


def singular_values(b: Array, a: Array, scale: float) -> Array:
    """Return the min(r, out, in) singular values of scale · b @ a by thin QR, descending."""
    xp = namespace(b)
    _, r_b = xp.linalg.qr(widened(b))
    _, r_a = xp.linalg.qr(widened(a.T))
    return abs(scale) * xp.linalg.svdvals(r_b @ r_a.T)


def rsvd_factors(
    b: Array,
    a: Array,
    scale: float,
    rank: int,
    *,
    oversample: int,
    power_iterations: int,
    seed: int,
) -> Factors:
    """Return factors of a rank by randomised SVD, applying b and a in turn to thin blocks.

    Source: Halko et al. 2011, algorithm 4.4 and 5.1, on the operator x ↦ scale · b(ax).

    Args:
        b: (out, r).
        a: (r, in).
        scale: multiplies the product.
        rank: k.
        oversample: further random directions, p.
        power_iterations: q.
        seed: of the random start; the same on every device.
    """
    xp = namespace(b)
    b, a = scale * widened(b), widened(a)
    width = min(rank + oversample, b.shape[0], a.shape[1])
    start = np.random.default_rng(seed).standard_normal((a.shape[1], width))
    probe = xp.astype(xp.asarray(start, device=a.device), wide(a))
    q, _ = xp.linalg.qr(b @ (a @ probe))
    for _ in range(power_iterations):
        q, _ = xp.linalg.qr(a.T @ (b.T @ q))
        q, _ = xp.linalg.qr(b @ (a @ q))
    small = (q.T @ b) @ a
    u, s, vt = xp.linalg.svd(small, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank, :]
    root = xp.sqrt(s)
    return _sign_fixed(q @ (u * root), root[:, None] * vt, s)


def squared_sizes(b: Array, a: Array) -> float:
    """Return Σ‖bᵢ‖²‖aᵢ‖² over columns of b and rows of a."""
    xp = namespace(b)
    of_b = xp.sum(widened(b) ** 2, axis=0)
    return float(xp.sum(of_b * xp.sum(widened(a) ** 2, axis=1)))


def multiplied_out(b: Array, a: Array) -> tuple[Array, Array]:
    """Return a pair whose product is b @ a and whose rank is the smaller of its sides.

    The pair is b @ a and an identity, on the side that is smaller.
    """
    xp = namespace(b)
    product = widened(b) @ widened(a)
    out, in_ = product.shape
    one = xp.eye(min(out, in_), dtype=product.dtype, device=product.device)
    return (one, product) if out <= in_ else (product, one)
