"""Q8_0: 32 signed bytes and their scale in float16, as ggml rounds them.

The bits are those of the reference code in `ggml-quants.c`, which gguf-py's are too; it takes four
times as long. A value is d·q with d = max|x|/127, where q is x/d rounded, halves away from zero.
Other quantised types are left to gguf-py: this is the one that whole models are stored in.
"""

from __future__ import annotations

import numpy as np

from loratools_formats.core import half
from loratools_formats.core.dtypes import Array

BLOCK = 32
_LARGEST_CODE = np.float32(127)
_STORED = np.dtype([("scale", "<f2"), ("codes", np.int8, (BLOCK,))])
_AT_ONCE = 1 << 11  # blocks; what they need stays in the cache


def encode(values: Array) -> Array:
    """Return the stored bytes of blocks.

    Args:
        values: (blocks, 32) float32, contiguous. Blocks with NaN or infinite values get scales
            which are not finite.

    Returns:
        (blocks, 34) uint8.
    """
    stored = np.empty(len(values), _STORED)
    for start in range(0, len(values), _AT_ONCE):
        piece = slice(start, start + _AT_ONCE)
        _encode(values[piece], stored[piece])
    return stored.view(np.uint8).reshape(-1, _STORED.itemsize)


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def _encode(values: Array, stored: Array) -> None:
    scales = _largest(values) / _LARGEST_CODE
    stored["scale"] = scales
    inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    twice = values * inverse[:, None]
    twice += twice
    # Twice the value without its fraction tells on which side of a half it lies. Away from zero is
    # then: one more where it is positive, and halved towards minus infinity.
    codes = twice.astype(np.int16)
    codes += 1
    codes += codes - 1 >> 15
    codes >>= 1
    stored["codes"] = codes


def _largest(values: Array) -> Array:
    """Return the largest magnitude of each block; NaN if one is. (blocks,) float32.

    Neighbours are compared again and again: long passes are faster than many short reductions.
    """
    found = np.abs(values).reshape(-1)
    for _ in range(BLOCK.bit_length() - 1):
        found = np.maximum(found[0::2], found[1::2])
    return found


@np.errstate(over="ignore", invalid="ignore")
def decode(stored: Array) -> Array:
    """Return the values of stored blocks.

    Args:
        stored: (blocks, 34) uint8, contiguous.

    Returns:
        (blocks, 32) float32.
    """
    blocks = stored.reshape(-1).view(_STORED)
    values = np.empty((len(blocks), BLOCK), np.float32)
    scales = np.empty(len(blocks), np.float32)
    half.widen(np.ascontiguousarray(blocks["scale"]), scales)
    for start in range(0, len(blocks), _AT_ONCE):
        piece = slice(start, start + _AT_ONCE)
        np.copyto(values[piece], blocks["codes"][piece])
        values[piece] *= scales[piece, None]
    return values
