"""From values to codes: the nearest one, and which of two ways to quantise a group is nearer.

Ties go to the even code, values beyond the last code to the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from loratools.base.codecs.bits import E2M1, QUARTERS, looked_up
from loratools_formats.core.dtypes import DTYPES, Array, DType, encode

_LARGEST = {"F4_E2M1": 6.0, "I4": 1.75, "F8_E4M3": 448.0, "F8_E5M2": 57344.0}
FOURS: dict[str, Array] = {"F4_E2M1": E2M1, "I4": QUARTERS}
"""What codes of four bits mean, by their kind."""
_SIGN = 0x8000


def float_codes(values: Array, kind: str) -> Array:
    """Return the codes of small floats: U8, of the shape of `values`.

    Args:
        values: F32; NaN becomes zero.
        kind: F4_E2M1, I4 (a sign and quarters up to 1.75), F8_E4M3 or F8_E5M2.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    top = (bits >> np.uint32(16)).astype(np.uint16)
    # Whether anything is cut off decides on which side of a tie a value lies.
    top |= (bits & np.uint32(0xFFFF)) != 0
    return looked_up(_codes_by_top(kind), top)


@cache
def _codes_by_top(kind: str) -> Array:
    """Return the code of each float32 by its upper half, whose last bit stands for the lower."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    values = (halves << np.uint32(16)).view(np.float32)
    limit = np.float32(_LARGEST[kind])
    with np.errstate(invalid="ignore"):
        finite = np.nan_to_num(np.clip(values, -limit, limit), nan=0.0)
    if kind in FOURS:
        magnitudes = FOURS[kind][:8].astype(np.float64)
        between = (magnitudes[1:] + magnitudes[:-1]) / 2
        size = np.abs(finite).astype(np.float64)
        codes = np.searchsorted(between, size, side="left")
        is_tie = np.isin(size, between)
        codes += is_tie & (codes % 2 == 1)
        return (codes + np.where(halves & _SIGN, 8, 0)).astype(np.uint8)
    return finite.astype(DTYPES[kind].numpy_dtype()).view(np.uint8)


def integer_codes(values: Array, scales: Array, zeros: Array | float, top: int) -> Array:
    """Return the nearest of 0 to `top` to values / scale + zero: U8 (rows, groups, size).

    Args:
        values: F32 (rows, groups, size).
        scales: F32 (rows, groups); where one is zero, any code means zero.
        zeros: F32 (rows, groups), or one number.
        top: the largest code.
    """
    safe = np.where(scales == 0, np.float32(1), scales)
    codes = values / safe[:, :, None]
    codes += zeros if isinstance(zeros, float) else zeros[:, :, None]
    np.rint(codes, out=codes)
    np.fmax(codes, 0, out=codes)  # and NaN, of values that are none, becomes zero
    np.fmin(codes, top, out=codes)
    found: Array = codes.astype(np.uint8)
    return found


def rounded(values: Array, dtype: DType) -> Array:
    """Return float32 values that are values of a type."""
    if dtype.code == "F32":
        return values
    narrow: Array = encode(values, dtype).astype(np.float32)
    return narrow


@dataclass(frozen=True)
class Attempt:
    """One way to quantise groups.

    Attributes:
        codes: U8 (rows, groups, size).
        values: F32 (rows, groups, size) what they mean.
        numbers: the groups' scales and the like, each (rows, groups) in any type.
    """

    codes: Array
    values: Array
    numbers: Sequence[Array]


def nearer(wanted: Array, first: Attempt, second: Attempt) -> Attempt:
    """Return, group by group, the second of two attempts where it is nearer, else the first.

    Args:
        wanted: F32 (rows, groups, size).
        first: kept in doubt.
        second: of the same shapes.
    """
    better = _squared_error(second.values, wanted) < _squared_error(first.values, wanted)
    if not better.any():
        return first
    each = better[:, :, None]
    return Attempt(
        np.where(each, second.codes, first.codes),
        np.where(each, second.values, first.values),
        [
            np.where(better, new, old)
            for new, old in zip(second.numbers, first.numbers, strict=True)
        ],
    )


def as_they_were(wanted: Array, old: Attempt, new: Attempt) -> Attempt:
    """Return the new attempt with what is stored already wherever nothing new is nearer.

    Values that were rounded after they were multiplied may be nearer to the code that they came
    from than to the one that is computed from them.
    """
    (places,) = (old.codes != new.codes).reshape(-1).nonzero()
    if len(places):
        before, after, goal = (x.reshape(-1)[places] for x in (old.values, new.values, wanted))
        kept = places[np.abs(before - goal) <= np.abs(after - goal)]
        new.codes.reshape(-1)[kept] = old.codes.reshape(-1)[kept]
        new.values.reshape(-1)[kept] = old.values.reshape(-1)[kept]
    return new


def _squared_error(values: Array, wanted: Array) -> Array:
    apart = values - wanted
    error: Array = np.einsum("rgs,rgs->rg", apart, apart)
    return error
