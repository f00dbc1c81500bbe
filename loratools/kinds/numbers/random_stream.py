"""The random numbers that torch draws on the CPU, without torch.

Some adapters store a seed instead of tensors. torch's CPU generator is the Mersenne Twister with
its usual seeding, which NumPy has as well; how numbers are made of its 32-bit words is below.
Source: `CPUGeneratorImpl`, `uniform_real_distribution`, `randperm_cpu` and `normal_fill` in ATen.
These streams have been the same since torch 1.0; the tests compare them with the installed torch.
"""

from __future__ import annotations

import math

import numpy as np

from loratools_formats.core.dtypes import Array, DType, encode
from loratools_formats.disk.errors import UnsupportedError

_LARGEST_PERMUTATION = (2**32 - 1) // 20  # torch changes the algorithm there


class TorchStream:
    """A `torch.Generator("cpu").manual_seed(seed)`.

    Args:
        seed: as given to torch, which uses its low 32 bits.
    """

    def __init__(self, seed: int) -> None:
        self._twister = np.random.MT19937()
        self._twister._legacy_seeding(seed & 0xFFFFFFFF)  # noqa: SLF001

    def _words(self, count: int) -> Array:
        words: Array = self._twister.random_raw(count).astype(np.uint32)
        return words

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Array:
        """Return what `torch.empty(shape).uniform_(low, high)` gives, in float32."""
        bits = self._words(math.prod(shape)) & np.uint32((1 << 24) - 1)
        unit = bits.astype(np.float32) * np.float32(2.0**-24)
        span = np.float32(high) - np.float32(low)
        result: Array = (unit * span + np.float32(low)).reshape(shape)
        return result

    def uniform_narrow(
        self, shape: tuple[int, ...], low: float, high: float, dtype: DType
    ) -> Array:
        """Return what `uniform_` gives on a bfloat16 or float16 tensor, in that type.

        Numbers that round up to the bound itself become the other bound.
        """
        values = encode(self.uniform(shape, low, high), dtype)
        bounds = encode(np.array([low, high], np.float32), dtype)
        result: Array = np.where(values == bounds[1], bounds[0], values)
        return result

    def normal(self, shape: tuple[int, ...], deviation: float) -> Array:
        """Return what `torch.normal(0, deviation, shape)` gives, in float32, to rounding.

        Fewer than 16 numbers are drawn in pairs. The rest of the last pair is dropped; torch
        would keep it for its next call of this kind.
        """
        count = math.prod(shape)
        if count < 16:
            few = self._normal_pairs((count + 1) // 2)[:count] * deviation
            return few.astype(np.float32).reshape(shape)
        values = self.uniform((count,), 0.0, 1.0)
        for start in range(0, count - 15, 16):
            values[start : start + 16] = _box_muller(values[start : start + 16])
        if count % 16:
            # torch draws the last sixteen anew.
            values[count - 16 :] = _box_muller(self.uniform((16,), 0.0, 1.0))
        result: Array = (values * np.float32(deviation)).reshape(shape)
        return result

    def _normal_pairs(self, pairs: int) -> Array:
        """Return 2·pairs normal numbers in float64, as torch's scalar Box-Muller draws them."""
        words = self._words(4 * pairs).astype(np.uint64).reshape(pairs, 2, 2)
        # A number in double precision is the low 53 bits of two words, the first one the high half.
        bits = (words[..., 0] << np.uint64(32) | words[..., 1]) & np.uint64((1 << 53) - 1)
        first, second = np.moveaxis(bits.astype(np.float64) * 2.0**-53, 1, 0)
        radius, angle = np.sqrt(-2.0 * np.log1p(-second)), 2.0 * math.pi * first
        result: Array = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
        return result

    def first_of_permutation(self, size: int, count: int) -> Array:
        """Return `torch.randperm(size)[:count]` as int64.

        Raises:
            UnsupportedError: longer than torch's algorithm for ordinary sizes reaches.
        """
        if size >= _LARGEST_PERMUTATION:
            raise UnsupportedError("a permutation this long is not supported", got=size)
        swapped: dict[int, int] = {}
        result = np.empty(count, np.int64)
        for i, word in enumerate(self._words(count).tolist()):
            j = i + word % (size - i)
            result[i] = swapped.get(j, j)
            swapped[j] = swapped.get(i, i)
        return result


def _box_muller(unit: Array) -> Array:
    """Turn sixteen uniform numbers into normal ones, the first eight into radii."""
    first, second = np.float32(1.0) - unit[:8], unit[8:]
    radius = np.sqrt(np.float32(-2.0) * np.log(first))
    angle = np.float32(2.0 * math.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
