"""Codes of a few bits in words of 32 bits, as compressed-tensors packs them along rows.

Up to 0.17 the library put as many whole codes into a word as fit, later a dense stream.
"""

from __future__ import annotations

import numpy as np

from loratools.base.codecs.bits import numbers, packed
from loratools_formats.core.dtypes import Array


class Words:
    """Codes along rows of 32-bit words.

    Args:
        bits: of a code.
        dense: whether codes straddle words.
    """

    def __init__(self, bits: int, *, dense: bool) -> None:
        self.bits = bits
        self._dense = dense

    def read(self, words: Array, count: int) -> Array:
        """Return codes less 2^(bits − 1): F32 (rows, count), of I32 (rows, words)."""
        half = 1 << (self.bits - 1)
        if self._dense:
            return numbers(np.ascontiguousarray(words).view(np.uint8), self.bits, count, half)
        shifts = np.arange(32 // self.bits, dtype=np.uint32) * np.uint32(self.bits)
        spread = np.ascontiguousarray(words).view(np.uint32)[:, :, None] >> shifts
        spread &= np.uint32((1 << self.bits) - 1)
        codes: Array = spread.reshape(len(words), -1)[:, :count].astype(np.float32)
        codes -= np.float32(half)
        return codes

    def put(self, codes: Array, words: int) -> Array:
        """Return codes from 0 on as bytes of words: U8 (rows, 4 · words), of U8 (rows, count)."""
        if self._dense:
            data = packed(codes, self.bits)
            return np.pad(data, ((0, 0), (0, 4 * words - data.shape[1])))
        each = 32 // self.bits
        spread = np.pad(codes, ((0, 0), (0, words * each - codes.shape[1])))
        shifts = np.arange(each, dtype=np.uint32) * np.uint32(self.bits)
        parts = spread.reshape(len(codes), words, each).astype(np.uint32) << shifts
        joined: Array = np.bitwise_or.reduce(parts, axis=2)
        return joined.view(np.uint8)

    @staticmethod
    def number(count: int, bits: int, *, dense: bool) -> int:
        """Return how many words hold a number of codes."""
        return -(-count * bits // 32) if dense else -(-count // (32 // bits))
