"""Sketches of ΔW: a few thousand numbers whose inner products estimate those of the changes.

In module m, block k of a sketch is Qᵀ ΔW P with fixed matrices Q (out, 16) and P (in, 16) of random
signs; a sketch is the sum over all modules of 16 blocks of independent signs. Signs of different
rows and columns are independent, so the mean of ⟨QᵀXP, QᵀYP⟩/16² over the signs is ⟨X, Y⟩, and that
of two different modules is 0. Only ΔW counts, not how it is split into factors.

The standard error of an estimated cosine of 0 is at most
    √((4/k + 4/k²) Σ aₘbₘ + 2/k²) / √blocks, k = 16,
where aₘ and bₘ are the shares of ‖ΔW‖² in module m: the first term is what signs within one module
add, the second what sums over modules add. (It is that of Gaussian entries, which random signs do
not exceed.) Towards cosines of ±1 it shrinks with 1 − cos², for sketches are compared by their
angle.

Signs come from the raw stream of Philox, which every version of NumPy keeps, under a key made of
the module's name. Sources: Johnson, Lindenstrauss 1984; Achlioptas 2003 (signs); Woodruff,
arXiv 1411.4357 (sketches of matrices from both sides).
"""

from __future__ import annotations

import hashlib

import numpy as np

from loratools_formats.core.dtypes import Array

BLOCKS = 16
SIDE = 16
SCHEME = "signs-16x16x16-v1"
"""What makes sketches comparable; another number of signs, or other signs, is another scheme."""

LENGTH = BLOCKS * SIDE * SIDE
_COLUMNS = BLOCKS * SIDE


def signs(module: str, side: str, count: int) -> Array:
    """Return the signs of one side of a module: (count, 256) float32 of ±1.

    Args:
        module: its path.
        side: `out`, `in` or `rank`.
        count: length of the side.
    """
    key = hashlib.sha256(f"{SCHEME}\n{side}\n{module}".encode()).digest()
    words = np.random.Philox(key=np.frombuffer(key[:16], "<u8")).random_raw(count * _COLUMNS // 64)
    bits = np.unpackbits(words.astype("<u8").view(np.uint8)).reshape(count, _COLUMNS)
    found: Array = bits.astype(np.float32) * np.float32(2.0) - np.float32(1.0)
    return found


def blocks(left: Array, right: Array) -> Array:
    """Return the blocks of a product, from both factors' products with signs: (4096,) float64.

    Args:
        left: (r, 256) Bᵀ Q.
        right: (r, 256) A P.
    """
    shape = (-1, BLOCKS, SIDE)
    found: Array = np.einsum(
        "rbi,rbj->bij", left.reshape(shape).astype(np.float64), right.reshape(shape), optimize=True
    )
    return found.reshape(-1)


def unit(sketch: Array) -> Array:
    """Return a sketch of length 1, whose inner products are cosines; zeros stay."""
    length = float(np.linalg.norm(sketch))
    return sketch / length if length > 0.0 else sketch


def standard_errors(shares: Array, others: Array) -> Array:
    """Return the standard error of estimated cosines of 0: (N, K).

    Args:
        shares: (N, M) share of ‖ΔW‖² of each module.
        others: (K, M).
    """
    within = (4.0 / SIDE + 4.0 / SIDE**2) * (shares @ others.T)
    found: Array = np.sqrt((within + 2.0 / SIDE**2) / BLOCKS)
    return found
