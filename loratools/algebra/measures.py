"""Measures of a matrix by its singular values, and of its energy beside a random matrix's.

Definitions, with σ the singular values and p = σ/Σσ:
  stable rank          Σσ²/σ₁² (Rudelson, Vershynin 2007)
  effective rank       exp(−Σ p log p) (Roy, Vetterli 2007; p of σ, not of σ²)
  participation ratio  (Σσ²)²/Σσ⁴
  energy rank          least k with Σ_{i≤k} σᵢ² ≥ τ·Σσ²
  threshold rank       number of σ above the Gavish–Donoho threshold (arXiv 1305.5870)
  knee                 number of σ before the point farthest below the chord of the spectrum
                       (Kneedle: Satopää et al. 2011); all of them if no point lies below it
  concentration        Σeᵢ²/(Σeᵢ)² of the energies eᵢ of rows, over what it is on average for
                       singular vectors drawn uniformly at random: (1 + 2/PR)/(m + 2)
  kurtosis             mn·Σx⁴/(Σx²)² of the entries, whose mean for random singular vectors is
                       mn(3 + 6/PR)/((m + 2)(n + 2)); PR is the participation ratio
Both random means follow from E x⁴ = 3/(m(m+2)) and E x²y² = 1/(m(m+2)) on the unit sphere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from loratools.algebra.ranks import gavish_donoho
from loratools.algebra.thin import Thin
from loratools.work.json_object import named
from loratools_formats.core.dtypes import Array


@dataclass(frozen=True, kw_only=True)
class SpectrumMeasures:
    """What a spectrum tells.

    Attributes:
        frobenius: ‖ΔW‖_F.
        spectral: σ₁.
        stable_rank: Σσ²/σ₁²; 0 of a zero matrix, as all ranks are.
        effective_rank: exp of the entropy of σ/Σσ.
        participation_ratio: (Σσ²)²/Σσ⁴.
        energy_rank_90: least rank with 0.9 of the energy.
        energy_rank_95: with 0.95.
        energy_rank_99: with 0.99.
        threshold_rank: singular values above the Gavish–Donoho threshold.
        knee: singular values before the knee of the spectrum.
        top_share: σ₁²/Σσ².
    """

    frobenius: float
    spectral: float
    stable_rank: float
    effective_rank: float
    participation_ratio: float
    energy_rank_90: int = named("energy_rank_0.9")
    energy_rank_95: int = named("energy_rank_0.95")
    energy_rank_99: int = named("energy_rank_0.99")
    threshold_rank: int
    knee: int
    top_share: float

    @property
    def energy_ranks(self) -> tuple[int, int, int]:
        """Least ranks with 0.9, 0.95 and 0.99 of the energy."""
        return self.energy_rank_90, self.energy_rank_95, self.energy_rank_99


_NOTHING = SpectrumMeasures(
    frobenius=0.0,
    spectral=0.0,
    stable_rank=0.0,
    effective_rank=0.0,
    participation_ratio=0.0,
    energy_rank_90=0,
    energy_rank_95=0,
    energy_rank_99=0,
    threshold_rank=0,
    knee=0,
    top_share=0.0,
)


def measures(sigma: Array, shape: tuple[int, int], tail: float = 0.0) -> SpectrumMeasures:
    """Return what a spectrum tells.

    Args:
        sigma: (k,) descending singular values.
        shape: (out, in).
        tail: energy of singular values that are not known. It counts in norms and shares; ranks
            that lie in it are k.
    """
    squares = sigma**2
    total = float(squares.sum()) + tail
    if total == 0.0:
        return _NOTHING
    shares = sigma[sigma > 0.0] / sigma.sum()
    return SpectrumMeasures(
        frobenius=math.sqrt(total),
        spectral=float(sigma[0]),
        stable_rank=total / float(squares[0]),
        effective_rank=float(np.exp(-np.sum(shares * np.log(shares)))),
        participation_ratio=1.0 / float(((squares / total) ** 2).sum()),
        energy_rank_90=_energy_rank(squares, total, 0.9),
        energy_rank_95=_energy_rank(squares, total, 0.95),
        energy_rank_99=_energy_rank(squares, total, 0.99),
        threshold_rank=int(np.sum(sigma > gavish_donoho(sigma, shape))),
        knee=knee(sigma),
        top_share=float(squares[0]) / total,
    )


def _energy_rank(squares: Array, total: float, share: float) -> int:
    sums = np.cumsum(squares)
    return min(int(np.searchsorted(sums, share * total)) + 1, len(squares))


def knee(sigma: Array) -> int:
    """Return how many values come before the knee of a descending spectrum.

    >>> knee(np.array([10.0, 10.0, 10.0, 1.0, 1.0, 1.0])), knee(np.array([3.0, 2.0, 1.0]))
    (3, 3)
    """
    count = len(sigma)
    drop = float(sigma[0] - sigma[-1]) if count > 2 else 0.0
    if drop <= 1e-12 * float(sigma[0]):
        return count
    below = 1.0 - np.arange(count) / (count - 1) - (sigma - sigma[-1]) / drop
    farthest = int(np.argmax(below))
    return max(farthest, 1) if below[farthest] > 1e-9 else count


def concentration(energies: Array, participation_ratio: float) -> float:
    """Return how much more the energy of rows gathers in few of them than at random.

    Args:
        energies: (m,) squared norms of rows, or of columns.
        participation_ratio: of the singular values.
    """
    total = float(energies.sum())
    if total == 0.0:
        return 0.0
    random = (1.0 + 2.0 / participation_ratio) / (len(energies) + 2)
    return float(np.sum((energies / total) ** 2)) / random


def kurtosis(thin: Thin, participation_ratio: float) -> tuple[float, float]:
    """Return the kurtosis of all entries, streamed, and its mean for random singular vectors."""
    second = fourth = 0.0
    size = math.sqrt(thin.squared_norm) or 1.0  # fourth powers of large entries overflow
    for _, _, block in thin.blocks():
        squares = (block / size) ** 2
        second += float(squares.sum())
        fourth += float(np.vdot(squares, squares))
    if second == 0.0:
        return 0.0, 0.0
    rows, columns = thin.shape
    random = rows * columns * (3.0 + 6.0 / participation_ratio) / ((rows + 2) * (columns + 2))
    return rows * columns * fourth / second**2, random
