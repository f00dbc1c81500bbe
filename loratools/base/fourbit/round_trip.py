"""A plain checkpoint as a loader of bitsandbytes sees it: its linear weights to four bits and back.

An adapter that was trained on four bits (QLoRA) fits these values, not the plain ones. They are
those of `quantize` and then `dequantize`, computed when they are read. The four-bit codes of one
weight are held for each thread: half a byte for an element.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace

from loratools.base.codecs import CodedWeight
from loratools.base.codecs.bitsandbytes import FourBitWeight
from loratools.base.fourbit.encode import FourBitOptions
from loratools.base.fourbit.store import Kept, blanks, fill
from loratools.base.linears import linear_weights
from loratools_formats.checkpoints.bitsandbytes import quantized_weights
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.core.dtypes import Array, encode
from loratools_formats.core.tensors import Buffer, TensorRef, in_file

_PIECE = 1 << 20


def round_tripped(base: Checkpoint, options: FourBitOptions) -> tuple[Checkpoint, frozenset[str]]:
    """Return a checkpoint with the weights that bitsandbytes would quantise, and their names.

    Args:
        base: a checkpoint of plain weights.
        options: type and scales of the four bits.

    Raises:
        UnsupportedError: a linear weight is of a type that cannot be quantised.
    """
    found = linear_weights(base, {}).weights
    changed: Mapping[str, TensorRef] = {
        key: _RoundTripped(ref, options, transposed=is_conv1d(key, base.config)).tensor()
        for key, ref in found.items()
    }
    tensors = {key: changed.get(key, ref) for key, ref in base.tensors.items()}
    return replace(base, tensors=tensors), frozenset(changed)


class _RoundTripped:
    """The bytes of one weight, quantised when the first of them are read."""

    _kept = threading.local()

    def __init__(self, ref: TensorRef, options: FourBitOptions, *, transposed: bool) -> None:
        self._ref, self._options, self._transposed = ref, options, transposed

    def tensor(self) -> TensorRef:
        """Return it as a tensor of the plain weight's name, type and shape."""
        return in_file(self._ref.key, self._ref.dtype, self._ref.shape, self, 0)

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return exactly `nbytes` bytes from `offset`, both whole elements."""
        width = self._ref.dtype.bits // 8
        values = self._weight().elements(offset // width, (offset + nbytes) // width)
        return memoryview(encode(values, self._ref.dtype).view("u1").reshape(-1).data)

    def _weight(self) -> CodedWeight:
        kept = getattr(self._kept, "last", None)
        if kept is None or kept[0] is not self:
            self._kept.last = None
            kept = self._kept.last = (self, self._quantised())
        weight: CodedWeight = kept[1]
        return weight

    def _quantised(self) -> CodedWeight:
        ref = self._ref
        shape = ref.shape[::-1] if self._transposed else ref.shape
        sinks = {b.key: Kept(b) for b in blanks(ref.key, shape, self._options)}
        fill(sinks, ref.key, shape, ref.dtype, self._options, self._pieces())
        tensors = {key: sink.tensor() for key, sink in sinks.items()}
        return FourBitWeight(quantized_weights(tensors)[ref.key], transposed=self._transposed)

    def _pieces(self) -> Iterator[Array]:
        if self._transposed:
            yield self._ref.load().T.copy()
            return
        for start in range(0, self._ref.numel, _PIECE):
            yield self._ref.elements(start, min(start + _PIECE, self._ref.numel))
