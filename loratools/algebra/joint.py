"""Several matrices in one pair of bases: ΔWᵢ ≈ U Σᵢ Vᵀ, computed on small cores.

The spans of all columns and of all rows hold every ΔWᵢ, so each is a core Mᵢ between orthonormal
bases of them, and no ΔW is formed. Only the ΔWᵢ count: how they are split into factors does not.

- `principal`: U and V are the leading principal directions of all columns and of all rows (the
  subspaces of SHARE, arXiv 2602.06043, taken of ΔW instead of its factors).
- `full`: alternating eigenvalue iterations maximise Σ wᵢ‖UᵀMᵢV‖², which is JD-Full of
  arXiv 2407.00066. Each step can only gain.
- `diagonal`: U and V are free and every Σᵢ is diagonal, by alternating least squares (JD-Diag of
  the same paper; a CP decomposition of the cores).

Nothing here rounds, and nothing knows of files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.thin import Thin
from loratools_formats.core.dtypes import Array

_EPS = float(np.finfo(np.float64).eps)
_NOISE_ROW = 64.0  # times ε and √width: a row of a triangular factor that is only rounding
_EIGEN_SIZE = 384  # up to which eigenvectors are computed anew; above, one step of iteration
_STEPS = 100
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Triplets:
    """The singular triplets of one matrix that are more than rounding.

    Attributes:
        u: (out, r), orthonormal columns.
        s: (r,), descending.
        v: (in, r), orthonormal columns.
    """

    u: Array
    s: Array
    v: Array

    @classmethod
    def of(cls, thin: Thin) -> Triplets:
        """Return the triplets of a product of factors, all in float64."""
        u, s, vt = thin.svd
        kept = s > s[0] * max(thin.shape) * _EPS if len(s) else s > 0.0
        return cls(u[:, kept], s[kept], vt[kept].T)

    @property
    def squared_norm(self) -> float:
        """‖ΔW‖²_F."""
        return float(self.s @ self.s)


class Joint:
    """The cores of several matrices of one shape.

    Args:
        triplets: of each matrix.
        weights: what a squared error of each counts; at least 0.
    """

    def __init__(self, triplets: Sequence[Triplets], weights: Sequence[float]) -> None:
        roots = np.sqrt(np.asarray(weights, np.float64))
        ends = np.cumsum([0, *(len(one.s) for one in triplets)])
        self._blocks = [slice(*pair) for pair in itertools.pairwise(ends)]
        scale = np.concatenate([w * one.s for w, one in zip(roots, triplets, strict=True)])
        self._span_u, left = _turned(*_span([one.u for one in triplets]), scale)
        self._span_v, right = _turned(*_span([one.v for one in triplets]), scale)
        self._left, self._right = left * scale, right
        self.total = float(scale @ scale)

    @property
    def sizes(self) -> tuple[int, int]:
        """Dimensions of the spans of all columns and of all rows."""
        return len(self._left), len(self._right)

    @property
    def rank(self) -> int:
        """The rank at which nothing is lost."""
        return max(self.sizes)

    def energies(self) -> Array:
        """Return what each further rank of `principal` keeps of Σ wᵢ‖ΔWᵢ‖²: (rank,) float64."""
        square = np.zeros((self.rank, self.rank))
        p, q = self.sizes
        for block in self._blocks:
            square[:p, :q] += (self._left[:, block] @ self._right[:, block].T) ** 2
        sums = np.cumsum(np.cumsum(square, axis=0), axis=1).diagonal()
        return np.maximum(np.diff(sums, prepend=0.0), 0.0)

    def principal(self, rank: int) -> tuple[Array, Array]:
        """Return U (out, min(rank, p)) and V (in, min(rank, q)) of the leading directions."""
        return self._lifted(*self._leading(rank))

    def full(
        self, rank: int, *, steps: int = _STEPS, tolerance: float = _TOLERANCE
    ) -> tuple[Array, Array]:
        """Return the U and V that full cores keep most with, orthonormal.

        Args:
            rank: columns of each, as far as the spans have them.
            steps: at most.
            tolerance: gain of a step, as a share of what is not kept, at which to stop.
        """
        return self._lifted(*self._full(rank, steps, tolerance))

    def diagonal(
        self, rank: int, *, steps: int = 2 * _STEPS, tolerance: float = 1e-4
    ) -> tuple[Array, Array]:
        """Return U (out, rank) and V (in, rank) for diagonal cores, with columns of length 1.

        Args:
            rank: columns of each, at most as many as the smaller span has dimensions.
            steps: at most.
            tolerance: fall of the error of a step, as a share of it, at which to stop.
        """
        rank = min(rank, *self.sizes)
        if not rank:  # all matrices are zero
            return self.principal(0)
        u, v = self._diagonal_start(rank)
        left, right, before = self._left, self._right, np.inf
        d = self._diagonals(u, v)
        for _ in range(steps):
            u = _unit(left @ self._spread(right.T @ v, d) @ _inverse((v.T @ v) * (d.T @ d)))
            d = self._diagonals(u, v)
            v = _unit(right @ self._spread(left.T @ u, d) @ _inverse((u.T @ u) * (d.T @ d)))
            d = self._diagonals(u, v)
            error = self.total - float(np.sum((d @ ((u.T @ u) * (v.T @ v))) * d))
            if not error < before - tolerance * max(error, _EPS * self.total):
                break
            before = error
        order = np.argsort(-np.sum(d * d, axis=0), kind="stable")
        return _signed(self._span_u @ u[:, order]), _signed(self._span_v @ v[:, order])

    def _leading(self, rank: int) -> tuple[Array, Array]:
        p, q = self.sizes
        return np.eye(p, min(rank, p)), np.eye(q, min(rank, q))

    def _full(self, rank: int, steps: int, tolerance: float) -> tuple[Array, Array]:
        u, v = self._leading(rank)
        before = -np.inf
        for _ in range(steps):
            if u.shape[1] == len(u) and v.shape[1] == len(v):
                break
            u = self._improved(self._left, self._right.T @ v, u)
            v = self._improved(self._right, self._left.T @ u, v)
            cores = self._cores(u, v)
            kept = float(np.sum(cores * cores))
            if not kept > before + tolerance * (self.total - kept) + 4 * _EPS * self.total:
                break
            before = kept
        if not (u.shape[1] and v.shape[1]):
            return u, v  # all matrices are zero
        cores = self._cores(u, v)
        stacked = cores.transpose(1, 0, 2).reshape(u.shape[1], -1)
        across = cores.transpose(2, 0, 1).reshape(v.shape[1], -1)
        return u @ _principal(stacked), v @ _principal(across)

    def _improved(self, factor: Array, other: Array, basis: Array) -> Array:
        """Return a better basis of one side, given what the other side's basis leaves: (R, k).

        It maximises Σ‖basisᵀ Fᵢ Tᵢ‖²: by eigenvectors where that is cheap, else by one step of
        orthogonal iteration, which cannot lose since the matrix is positive semidefinite.
        """
        count = basis.shape[1]
        if count == len(basis):
            return basis
        seen = np.empty_like(factor)
        for block in self._blocks:
            seen[:, block] = factor[:, block] @ (other[block] @ other[block].T)
        if len(factor) <= _EIGEN_SIZE:
            _, vectors = np.linalg.eigh(seen @ factor.T)
            return np.ascontiguousarray(vectors[:, ::-1][:, :count])
        q, _ = np.linalg.qr(seen @ (factor.T @ basis))
        return q

    def _cores(self, u: Array, v: Array) -> Array:
        """Return √wᵢ UᵀMᵢV of each: (N, kᵤ, kᵥ)."""
        left, right = u.T @ self._left, self._right.T @ v
        return np.stack([left[:, block] @ right[block] for block in self._blocks])

    def _spread(self, seen: Array, d: Array) -> Array:
        """Return the rows that each matrix has of (R, k), times its diagonal."""
        spread = np.empty_like(seen)
        for row, block in zip(d, self._blocks, strict=True):
            spread[block] = seen[block] * row
        return spread

    def _diagonals(self, u: Array, v: Array) -> Array:
        """Return the diagonals that fit best: (N, k)."""
        left, right = self._left.T @ u, self._right.T @ v
        told = np.stack([np.sum(left[b] * right[b], axis=0) for b in self._blocks])
        return told @ _inverse((u.T @ u) * (v.T @ v))

    def _diagonal_start(self, rank: int) -> tuple[Array, Array]:
        """Return the full bases, turned so that the leading mixture of their cores is diagonal."""
        u, v = self._full(rank, _STEPS, 1e-3)
        cores = self._cores(u, v)
        flat = cores.reshape(len(cores), -1)
        _, vectors = np.linalg.eigh(flat @ flat.T)
        x, _, yt = np.linalg.svd(np.tensordot(vectors[:, -1], cores, 1))
        return u @ x[:, :rank], v @ yt[:rank].T

    def _lifted(self, u: Array, v: Array) -> tuple[Array, Array]:
        return _signed(self._span_u @ u), _signed(self._span_v @ v)


@dataclass(frozen=True)
class Bases:
    """Bases as they are stored, and what their overlaps cost once.

    Attributes:
        u: (out, kᵤ) float64.
        v: (in, kᵥ).
        diagonal: whether cores are diagonal.
        gram_u: UᵀU.
        gram_v: VᵀV.
    """

    u: Array
    v: Array
    diagonal: bool
    gram_u: Array
    gram_v: Array

    @classmethod
    def of(cls, u: Array, v: Array, *, diagonal: bool) -> Bases:
        """Return bases with their overlaps."""
        return cls(u, v, diagonal, u.T @ u, v.T @ v)

    def core(self, one: Triplets) -> Array:
        """Return the core that fits a matrix best: (kᵤ, kᵥ), or (k,) of a diagonal one."""
        told = self._told(one)
        if self.diagonal:
            found: Array = told.diagonal() @ _inverse(self.gram_u * self.gram_v)
            return found
        return _inverse(self.gram_u) @ told @ _inverse(self.gram_v)

    def squared_error(self, one: Triplets, core: Array) -> float:
        """Return ‖ΔW − U Σ Vᵀ‖²_F, by QR where the difference is near rounding."""
        whole = np.diag(core) if self.diagonal else core
        size = one.squared_norm
        error = size - 2.0 * float(np.sum(whole * self._told(one)))
        error += float(np.sum((self.gram_u @ whole @ self.gram_v) * whole))
        if error > 1e-10 * size:
            return error
        _, left = np.linalg.qr(np.concatenate([one.u * one.s, self.u @ whole], axis=1))
        _, right = np.linalg.qr(np.concatenate([one.v, -self.v], axis=1))
        return float(np.sum((left @ right.T) ** 2))

    def _told(self, one: Triplets) -> Array:
        """Return UᵀΔWV."""
        product: Array = ((self.u.T @ one.u) * one.s) @ (one.v.T @ self.v)
        return product


def _span(bases: Sequence[Array]) -> tuple[Array, Array]:
    """Return an orthonormal basis Q of all columns, and their coordinates QᵀX side by side."""
    stacked = np.concatenate(bases, axis=1)
    if stacked.shape[1] >= len(stacked):
        return np.eye(len(stacked)), stacked
    return _without_noise(*np.linalg.qr(stacked))


def _turned(q: Array, coordinates: Array, scale: Array) -> tuple[Array, Array]:
    """Return a basis and coordinates turned to the principal directions of the scaled columns."""
    turn = _principal(coordinates * scale)
    return _without_noise(q @ turn, turn.T @ coordinates)


def _without_noise(q: Array, coordinates: Array) -> tuple[Array, Array]:
    """Leave out directions that only rounding adds, as of columns that stand there twice.

    Args:
        q: (n, p) orthonormal.
        coordinates: (p, R) of columns of length 1.
    """
    kept = np.abs(coordinates).max(axis=1, initial=0.0) > _NOISE_ROW * _EPS * np.sqrt(len(q))
    return q[:, kept], coordinates[kept]


def _principal(columns: Array) -> Array:
    """Return the eigenvectors of X Xᵀ, the largest first: (n, n)."""
    _, vectors = np.linalg.eigh(columns @ columns.T)
    return np.ascontiguousarray(vectors[:, ::-1])


def _inverse(gram: Array) -> Array:
    """Return the (pseudo-)inverse of a symmetric matrix without negative eigenvalues."""
    inverse: Array = np.linalg.pinv(gram, rcond=len(gram) * _EPS, hermitian=True)
    return inverse


def _unit(columns: Array) -> Array:
    norms = np.linalg.norm(columns, axis=0)
    return columns / np.where(norms > 0.0, norms, 1.0)


def _signed(columns: Array) -> Array:
    """Return columns whose largest entry is positive."""
    if not columns.size:
        return columns
    places = np.argmax(np.abs(columns), axis=0)
    return columns * np.where(columns[places, np.arange(columns.shape[1])] < 0.0, -1.0, 1.0)
