"""Float16 to float32 and back, bit for bit as NumPy does it, in a third of the time.

NumPy converts element by element where the processor has no instruction that it uses. Here a table
of all 65,536 numbers widens, and integer arithmetic on whole arrays rounds: to nearest, ties to
even. What is too small, too large or NaN for that arithmetic is left to NumPy.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools_formats.core.dtypes import Array

LEAST_ELEMENTS = 1 << 12
"""With fewer, NumPy is as fast."""

_AT_ONCE = 1 << 17  # what they need stays in the cache
_CUT_BITS = 13  # of a float32's mantissa
_MAGNITUDE, _SIGN = 0x7FFFFFFF, 0x8000
_LEAST_NORMAL = 0x38800000  # the bits of 2^-14 in float32
_LARGEST = 0x477FE000  # of 65504
_LEAST = 2.0**-14
_STEPS = 2.0**24  # a subnormal float16 counts steps of 2^-24
# What is added before the cut: nearly half of what is cut, and the exponents' biases made equal.
_ROUND = ((1 << (_CUT_BITS - 1)) - 1 - ((127 - 15) << 23)) % (1 << 32)


@functools.cache
def _half_values() -> Array:
    """Return the values of all 65,536 float16 numbers by their bits: (65536,) float32."""
    import numpy as np

    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def widen(values: Array, out: Array) -> None:
    """Convert float16 to float32.

    Args:
        values: (n,) float16, contiguous.
        out: (n,) float32, contiguous, receives them.
    """
    import numpy as np

    bits, table = values.view(np.uint16), _half_values()
    for start in range(0, len(bits), _AT_ONCE):
        stop = start + _AT_ONCE
        np.take(table, bits[start:stop], out=out[start:stop], mode="wrap")


def narrow(values: Array, out: Array) -> None:
    """Round float32 to float16, to nearest, ties to even.

    Args:
        values: (n,) float32, contiguous.
        out: (n,) float16, contiguous, receives them.
    """
    import numpy as np

    spare = np.empty((2, min(_AT_ONCE, len(values))), np.uint32)
    for start in range(0, len(values), _AT_ONCE):
        piece = values[start : start + _AT_ONCE]
        into = out[start : start + _AT_ONCE].view(np.uint16)
        places = _not_normal(piece.view(np.uint32), spare[0, : len(piece)])
        _round(piece.view(np.uint32), spare[:, : len(piece)], into)
        if len(places):
            into[places] = _others(piece[places])


def _not_normal(bits: Array, spare: Array) -> Array:
    """Return the places of numbers that are not normal in float16."""
    import numpy as np

    np.bitwise_and(bits, _MAGNITUDE, out=spare)
    np.subtract(spare, _LEAST_NORMAL, out=spare)  # what is below becomes large
    return np.flatnonzero(spare > _LARGEST - _LEAST_NORMAL)


def _round(bits: Array, spare: Array, out: Array) -> None:
    """Round the bits of numbers that are normal in float16."""
    import numpy as np

    rounded, sign = spare
    np.right_shift(bits, _CUT_BITS, out=rounded)
    np.bitwise_and(rounded, 1, out=rounded)  # whether what is kept is odd, for ties
    np.add(rounded, np.uint32(_ROUND), out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, _CUT_BITS, out=rounded)
    np.bitwise_and(rounded, _SIGN - 1, out=rounded)
    np.right_shift(bits, 16, out=sign)
    np.bitwise_and(sign, _SIGN, out=sign)
    np.bitwise_or(rounded, sign, out=rounded)
    np.copyto(out, rounded, casting="unsafe")


def _others(values: Array) -> Array:
    """Return the bits of float32 numbers that are subnormal, zero, infinite or NaN in float16."""
    import numpy as np

    sizes = np.abs(values)
    found = np.where(np.signbit(values), np.uint16(_SIGN), np.uint16(0))
    small = sizes < _LEAST
    found[small] |= np.rint(sizes[small] * np.float32(_STEPS)).astype(np.uint16)
    large = ~small
    if large.any():
        with np.errstate(over="ignore", invalid="ignore"):
            found[large] = values[large].astype(np.float16).view(np.uint16)
    return found
