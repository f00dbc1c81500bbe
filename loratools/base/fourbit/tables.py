"""The constants of the four-bit types, and the tables that make them fast.

A level is found exactly without comparing with all fifteen thresholds: [-1, 1] is cut into cells
so narrow that each holds at most one threshold. A table gives the number of thresholds at or below
a cell's left edge, and says which cells hold one; only values in those, one in a few hundred, are
compared. Every threshold is farther from the edges than the rounding of the cell's number, so a
value that rounding puts into the neighbouring cell gets the same level.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools_formats.checkpoints.bitsandbytes import QuantType

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Code 7 is zero. Source: bitsandbytes `get_4bit_type`.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa, over 12; codes 0 and 8 are both zero.
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)
# Codes in the order of their values; zero's two levels are split by the threshold 0.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

CELLS_PER_UNIT = 2048
HAS_THRESHOLD = 0x80


@dataclass(frozen=True)
class FourBit:
    """A four-bit type and its tables.

    Attributes:
        quant_type: its name.
        codebook: (16,) the value of each code, as stored in a `quant_map`.
        thresholds: (15,) a value's level is the number of them below it.
        cells: level at the left edge of each cell, plus `HAS_THRESHOLD` where one follows in it.
        shift: added to a value before its cell is taken, in cells.
        packed: (256,) the byte that two packed levels become; None if levels are codes.
        zero: code of an exact zero, which fills up an odd number of elements.
        pairs: (256,) the two values of a byte, first element first, as the bits of one number.
    """

    quant_type: QuantType
    codebook: F32
    thresholds: F32
    cells: U8
    shift: float
    packed: U8 | None
    zero: int
    pairs: NDArray[np.uint64]


@functools.cache
def four_bit(quant_type: QuantType) -> FourBit:
    """Return a type by name."""
    return _nf4() if quant_type == "nf4" else _fp4()


def _nf4() -> FourBit:
    codebook = np.array(_NF4, np.float32)
    thresholds = _midpoints(codebook)
    cells = _cells(thresholds, 0.0)
    return FourBit("nf4", codebook, thresholds, cells, CELLS_PER_UNIT, None, 7, _pairs(codebook))


def _fp4() -> FourBit:
    """The thresholds 0 and ±0.0859375 lie on edges of the plain cells, so these are shifted."""
    codebook = np.array(_FP4, np.float32) / np.float32(12)
    codebook[8] = 0.0
    order = np.array(_FP4_ORDER, np.uint8)
    thresholds = _midpoints(codebook[order])
    both = np.arange(256)
    packed = (order[both >> 4] << 4 | order[both & 15]).astype(np.uint8)
    return FourBit(
        "fp4",
        codebook,
        thresholds,
        _cells(thresholds, 0.5),
        CELLS_PER_UNIT + 0.5,
        packed,
        0,
        _pairs(codebook),
    )


def _midpoints(ascending: F32) -> F32:
    return (ascending[1:] + ascending[:-1]) / np.float32(2)


def _cells(thresholds: F32, shift: float) -> U8:
    """Return a table over all cells, and one more for values rounded beyond 1."""
    edges = (np.arange(2 * CELLS_PER_UNIT + 2) - shift) / CELLS_PER_UNIT - 1
    level = np.searchsorted(thresholds.astype(np.float64), edges, side="right")
    above = np.append(level[1:], len(thresholds))
    return (level + HAS_THRESHOLD * (above > level)).astype(np.uint8)


def _pairs(codebook: F32) -> NDArray[np.uint64]:
    both = np.arange(256)
    values = np.stack([codebook[both >> 4], codebook[both & 15]], axis=-1)
    return values.view(np.uint64).reshape(256)


@functools.cache
def dynamic_map() -> F32:
    """Return the (256,) signed dynamic map that double quantisation stores scales with, ascending.

    Source: bitsandbytes `create_dynamic_map`; 8-bit optimizers, arXiv 2110.02861.
    """
    values = [0.0, 1.0]
    for i in range(7):
        points = _linspace(0.1, 1, 2**i + 1)
        means = (points[:-1] + points[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (i - 6)) * means
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


def _linspace(start: float, stop: float, count: int) -> F32:
    """Equal steps in float32 from both ends, each point rounded once, as torch takes them."""
    low, high = np.float64(np.float32(start)), np.float64(np.float32(stop))
    step = np.float64(np.float32(high - low) / np.float32(count - 1))
    index = np.arange(count)
    points = np.where(index < count // 2, low + step * index, high - step * (count - 1 - index))
    return points.astype(np.float32)


BINS = 65535


@functools.cache
def dynamic_bins() -> U8:
    """Return the code of each of the 65,536 bins that bitsandbytes' CPU code sorts scales into."""
    code = dynamic_map()
    midpoints = np.float32(0.5) * (code[:-1] + code[1:])
    centres = np.arange(BINS + 1, dtype=np.float32) * np.float32(2) / np.float32(BINS) - 1
    return np.searchsorted(midpoints, centres.astype(np.float32), side="left").astype(np.uint8)


def is_close(found: NDArray[Any], wanted: F32) -> bool:
    """Return whether a stored table is the one meant, the last bits of float32 aside."""
    return bool(np.allclose(found, wanted, rtol=1e-6, atol=1e-7))
