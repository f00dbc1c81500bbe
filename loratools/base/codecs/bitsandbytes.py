"""Four-bit weights of bitsandbytes: codebook · scale, rounded to the type they were made from."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from loratools.base.codecs.codec import Codec, CodedWeight, Scheme, Stored, WholeEncoder
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.bitsandbytes import QuantizedWeight, quantized_weights
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.checkpoints.shard_plan import Sink
from loratools_formats.core.dtypes import Array

if TYPE_CHECKING:
    from loratools.base.fourbit.decode import Dequantizer


class FourBitWeight(CodedWeight):
    """A weight of bitsandbytes.

    Args:
        weight: where it is stored.
        transposed: whether the plain weight is the transpose, as Conv1D layers have it.
    """

    is_four_bit_format = True
    _kept = threading.local()

    def __init__(self, weight: QuantizedWeight, *, transposed: bool) -> None:
        self.weight = weight
        self._turned = transposed and len(weight.shape) == 2
        shape = weight.shape[::-1] if self._turned else weight.shape
        scheme = Scheme(weight.quant_type, 4, weight.blocksize)
        super().__init__(weight.key, shape, weight.dtype, weight.tensors, scheme)
        self._lock = threading.Lock()
        self._decoder: Dequantizer | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in the weight's type."""
        return matrix_rows(self, start, stop)

    def elements(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) of the flat weight in its type."""
        return self._values(start, stop, self.dtype.numpy_dtype())

    def exact(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) in float32, not rounded to the weight's type."""
        return self._values(start, stop, np.dtype(np.float32))

    def encoder(self) -> WholeEncoder:
        """Return what stores new values with new scales, quantised too if the old ones are."""
        return _FourBitEncoder(self.weight, transposed=self._turned)

    def _values(self, start: int, stop: int, dtype: np.dtype[np.generic]) -> Array:
        if not self._turned:
            return self._stored().elements(start, stop, np.empty(stop - start, dtype))
        kept = getattr(self._kept, "whole", None)
        if kept is None or kept[0] is not self or kept[1].dtype != dtype:
            whole = self._stored().elements(
                0, self.weight.numel, np.empty(self.weight.numel, dtype)
            )
            turned = np.ascontiguousarray(whole.reshape(self.weight.shape).T)
            kept = self._kept.whole = (self, turned.reshape(-1))
        values: Array = kept[1][start:stop]
        return values

    def _stored(self) -> Dequantizer:
        from loratools.base.fourbit.decode import Dequantizer

        with self._lock:
            if self._decoder is None:
                self._decoder = Dequantizer(self.weight)
            return self._decoder


class _FourBitEncoder(WholeEncoder):
    """New codes and scales, as bitsandbytes computes them."""

    def __init__(self, weight: QuantizedWeight, *, transposed: bool) -> None:
        from loratools.base.fourbit.encode import FourBitOptions
        from loratools.base.fourbit.store import blanks

        self._weight, self._transposed = weight, transposed
        self._options = FourBitOptions(
            quant_type=weight.quant_type,
            blocksize=weight.blocksize,
            double_quant=weight.nested is not None,
        )
        scheme = Scheme(weight.quant_type.upper(), 4, weight.blocksize)
        super().__init__(blanks(weight.key, weight.shape, self._options), scheme)

    def write(self, sinks: Mapping[str, Sink], values: Iterable[Array]) -> CodedWeight:
        """Write all tensors, and return the weight as it is stored now."""
        from loratools.base.fourbit.store import Kept, fill

        weight = self._weight
        kept = {blank.key: Kept(blank, sinks[blank.key]) for blank in self.blanks}
        ordered = self._ordered(values)
        fill(kept, weight.key, weight.shape, weight.dtype, self._options, ordered)
        written = quantized_weights({name: sink.tensor() for name, sink in kept.items()})
        return FourBitWeight(written[weight.key], transposed=self._transposed)

    def _ordered(self, values: Iterable[Array]) -> Iterator[Array]:
        """Yield values in the order in which they are stored."""
        if not self._transposed:
            yield from values
            return
        flat = np.concatenate([piece.reshape(-1) for piece in values])
        yield np.ascontiguousarray(flat.reshape(self._weight.shape[::-1]).T)


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    return {
        key: FourBitWeight(weight, transposed=is_conv1d(key, stored.config))
        for key, weight in quantized_weights(stored.tensors).items()
    }


CODEC = Codec("bitsandbytes in four bits", ("bitsandbytes",), _declare, keeps_conv1d=True)
