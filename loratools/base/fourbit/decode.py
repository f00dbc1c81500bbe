"""Four-bit codes to values: any range of elements of a stored weight.

value = codebook[code] · scale, in float32. Two codes at a time are looked up, and a result of 16
bits is rounded once. bitsandbytes' CPU code gives the same except where the last dimension is no
multiple of the blocksize: there it takes the wrong scales (0.50.2).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.base.fourbit.scales import unnest
from loratools.base.fourbit.tables import F32, four_bit, is_close
from loratools.work.buffers import Buffers
from loratools_formats.checkpoints.bitsandbytes import QuantizedWeight
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_BUFFERS = Buffers()
CHUNK = 1 << 19  # elements at a time


class Dequantizer:
    """Reads the values of one quantised weight; safe to share between threads.

    Args:
        weight: where it is stored.

    Raises:
        AdapterError: scales that are no finite numbers.
        UnsupportedError: another codebook than that of the type.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight
        codes = weight.packed  # of any type that they may be stored as
        self._packed = replace(codes, dtype=DTYPES["U8"], shape=(codes.nbytes,))
        self._kind = four_bit(weight.quant_type)
        if not is_close(weight.quant_map.load(), self._kind.codebook):
            raise UnsupportedError(
                f"codebook is not that of {weight.quant_type}", tensor=weight.quant_map.key
            )
        self._nested: tuple[F32, F32] | None = None
        if weight.nested is not None:
            self._nested = (
                _finite(weight.nested.absmax.load(np.float32), weight.nested.absmax.key),
                _finite(weight.nested.quant_map.load(np.float32), weight.nested.quant_map.key),
            )

    def elements(self, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the elements [start, stop) of the flattened weight.

        Args:
            start: first element.
            stop: one past the last.
            out: (stop − start,) array to fill, of a type that values are rounded to once; float32
                and fresh by default.

        Raises:
            AdapterError: scales that are no finite numbers, or a truncated file.
        """
        result = np.empty(stop - start, np.float32) if out is None else out
        for begin in range(start, stop, CHUNK):
            end = min(begin + CHUNK, stop)
            self._fill(begin, end, result[begin - start : end - start])
        return result

    def _fill(self, start: int, stop: int, out: NDArray[Any]) -> None:
        packed = _BUFFERS.array("packed", ((stop + 1) // 2 - start // 2,), np.uint8)
        self._packed.elements_into(start // 2, packed)
        pairs = _BUFFERS.array("pairs", (packed.size,), np.uint64)
        np.take(self._kind.pairs, packed, out=pairs, mode="wrap")
        values = pairs.view(np.float32)[start % 2 : start % 2 + stop - start]
        size = self.weight.blocksize
        first, last = start // size, -(-stop // size)
        scales = self._scales(first, last)
        head = min((first + 1) * size - start, values.size) if start % size else 0
        if head:
            values[:head] *= scales[0]
            scales = scales[1:]
        full = (values.size - head) // size * size
        rows = values[head : head + full].reshape(-1, size)
        rows *= scales[: len(rows), None]
        if head + full < values.size:
            values[head + full :] *= scales[-1]
        with np.errstate(over="ignore", under="ignore"):
            np.copyto(out, values, casting="same_kind")

    def _scales(self, first: int, last: int) -> F32:
        stored = self.weight.absmax
        width = stored.dtype.bits // 8
        data = stored.raw_range(first * width, last * width)
        if self._nested is None or self.weight.nested is None:
            scales: F32 = np.frombuffer(data, np.float32)
        else:
            absmax, values = self._nested
            codes = np.frombuffer(data, np.uint8)
            nested = self.weight.nested
            rounded = nested.dtype.numpy_dtype()
            scales = unnest(codes, absmax, nested.offset, values, first, rounded)
        return _finite(scales, stored.key)


def _finite(values: NDArray[Any], key: str) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise AdapterError("scales of a quantised weight are NaN or infinite", tensor=key)
    return values
