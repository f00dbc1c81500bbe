"""Weights of transformers' Conv1D layers, which hold (in, out) where the codes are (out, in).

The tools that quantise such a layer make a linear layer of it and store that, transposed. The plain
weight is the transpose again. A matrix is computed whole when it is asked for, and kept by each
thread until it asks for another one, since rows of one are columns of the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import numpy as np

from loratools.base.codecs.codec import CodedWeight, Encoder, WholeEncoder
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.shard_plan import Sink
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError

_PIECE = 1 << 17  # elements encoded at a time


class Transposed(CodedWeight):
    """The transpose of a weight.

    Args:
        weight: a matrix.
    """

    _kept = threading.local()

    def __init__(self, weight: CodedWeight) -> None:
        self._weight = weight
        self.caveat, self.caveat_written = weight.caveat, weight.caveat_written
        shape = weight.shape[::-1]
        super().__init__(weight.key, shape, weight.dtype, weight.parts, weight.scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in the weight's type."""
        return matrix_rows(self, start, stop)

    def elements(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) of the flat weight in its type."""
        kept = getattr(self._kept, "whole", None)
        if kept is None or kept[0] is not self:
            out, width = self._weight.shape
            whole = self._weight.elements(0, out * width).reshape(out, width)
            kept = self._kept.whole = (self, np.ascontiguousarray(whole.T).reshape(-1))
        values: Array = kept[1][start:stop]
        return values

    def encoder(self) -> WholeEncoder | None:
        """Return what stores new values as the weight is stored; None if it is only read."""
        encoder = self._weight.encoder()
        return _TransposedEncoder(self, encoder) if isinstance(encoder, Encoder) else None


class _TransposedEncoder(WholeEncoder):
    """Values of the transpose, encoded row by row as they are stored."""

    def __init__(self, weight: Transposed, encoder: Encoder) -> None:
        super().__init__(encoder.blanks, encoder.scheme)
        self._weight, self._encoder = weight, encoder

    def write(self, sinks: Mapping[str, Sink], values: Iterable[Array]) -> CodedWeight:
        """Write all tensors, and return the weight as it is stored now.

        Raises:
            AdapterError: NaN or infinite values.
        """
        weight = self._weight
        flat = np.concatenate([piece.reshape(-1) for piece in values]).astype(np.float32)
        if not np.isfinite(flat).all():
            raise AdapterError("values are NaN or infinite", tensor=weight.key)
        wanted = np.ascontiguousarray(flat.reshape(weight.shape).T)
        meant = np.empty_like(wanted)
        step = self._encoder.step
        height = max(_PIECE // (step * wanted.shape[1]), 1) * step
        for start in range(0, len(wanted), height):
            encoded = self._encoder.encode(start, wanted[start : start + height])
            for key, offset, data in encoded.pieces:
                sinks[key].write_at(offset, data.data)
            meant[start : start + height] = encoded.values
        return _Values(weight, np.ascontiguousarray(meant.T))


class _Values(CodedWeight):
    """A weight whose values are there."""

    def __init__(self, weight: CodedWeight, values: Array) -> None:
        super().__init__(weight.key, weight.shape, weight.dtype, weight.parts, weight.scheme)
        self._values = values

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32."""
        return self._values[start:stop]
