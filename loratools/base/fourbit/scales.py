"""Scales of blocks: how they are quantised a second time, and read back.

bitsandbytes' CPU code does not take the nearest of the 256 values of the dynamic map but sorts a
scale into one of 65,536 equal bins, whose centre decides; one code in a thousand differs from the
nearest. That is followed here to the bit, except for the mean that is subtracted
first: torch's depends on its number of threads, so here it is taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from loratools.base.fourbit.tables import BINS, F32, U8, dynamic_bins, dynamic_map
from loratools_formats.checkpoints.bitsandbytes import NESTED_BLOCKSIZE

SMALLEST = np.float32(1e-38)


@dataclass(frozen=True)
class NestedScales:
    """Scales in eight bits.

    Attributes:
        codes: (blocks,) into the dynamic map.
        absmax: (ceil(blocks / 256),) scale of each group of codes.
        offset: float32 value that was subtracted from all scales.
    """

    codes: U8
    absmax: F32
    offset: float


def mean(scales: F32) -> np.float32:
    """Return the mean of scales, correctly rounded whatever their number."""
    return np.float32(scales.mean(dtype=np.float64))


def nest(scales: F32) -> NestedScales:
    """Quantise the (blocks,) float32 scales of one tensor."""
    centre = mean(scales)
    count = -(-scales.size // NESTED_BLOCKSIZE)
    centred = np.zeros(count * NESTED_BLOCKSIZE, np.float32)
    centred[: scales.size] = scales - centre
    groups = centred.reshape(count, NESTED_BLOCKSIZE)
    absmax = np.abs(groups).max(axis=1, initial=0.0)
    inverse = np.zeros_like(absmax)
    np.divide(np.float32(1), absmax, out=inverse, where=absmax > 0)
    unit = np.clip(groups * inverse[:, None], np.float32(-1), np.float32(1))
    half = (unit + np.float32(1)) * np.float32(0.5)
    # One rounding of product and sum together, as a fused multiply-add has.
    bins = (half.astype(np.float64) * BINS + 0.5).astype(np.float32).astype(np.int64)
    codes = dynamic_bins()[np.clip(bins, 0, BINS)]
    codes[absmax == 0] = 0
    return NestedScales(codes.reshape(-1)[: scales.size], absmax, float(centre))


def unnest(
    codes: U8,
    absmax: F32,
    offset: float,
    values: F32 | None = None,
    first: int = 0,
    dtype: DTypeLike = np.float32,
) -> F32:
    """Return the float32 scales of `codes`.

    Args:
        codes: (n,) codes of consecutive blocks.
        absmax: scale of each group of 256 codes of the whole tensor.
        offset: added to all.
        values: (256,) what the codes mean; by default the dynamic map.
        first: number of the first of these blocks within its tensor.
        dtype: what each of the two steps is rounded to.
    """
    table = dynamic_map() if values is None else values
    group = np.arange(first, first + codes.size) // NESTED_BLOCKSIZE
    scaled = (table[codes] * absmax[group]).astype(dtype, copy=False)
    moved = scaled.astype(np.float32, copy=False) + np.float32(offset)
    return moved.astype(dtype, copy=False).astype(np.float32, copy=False)
