"""From values to the tensors that a four-bit weight is stored as, written while they are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratools.base.fourbit.encode import FourBitOptions, QuantisationLoss, StreamingQuantizer
from loratools.base.fourbit.tables import dynamic_map, four_bit
from loratools_formats.checkpoints.bitsandbytes import (
    MAX_STATE_BYTES,
    NESTED_BLOCKSIZE,
    state_json,
    state_key,
)
from loratools_formats.checkpoints.shard_plan import Blank, Sink
from loratools_formats.core.dtypes import DTYPES, DType
from loratools_formats.core.tensors import Buffer, TensorRef


def blanks(key: str, shape: tuple[int, ...], options: FourBitOptions) -> tuple[Blank, ...]:
    """Return the tensors that a weight of this shape becomes."""
    numel = math.prod(shape)
    blocks = -(-numel // options.blocksize)
    u8, f32 = DTYPES["U8"], DTYPES["F32"]
    nested = (
        Blank(f"{key}.nested_absmax", f32, (-(-blocks // NESTED_BLOCKSIZE),)),
        Blank(f"{key}.nested_quant_map", f32, (256,)),
    )
    return (
        Blank(key, u8, (-(-numel // 2), 1)),
        Blank(f"{key}.absmax", u8 if options.double_quant else f32, (blocks,)),
        Blank(f"{key}.quant_map", f32, (16,)),
        *(nested if options.double_quant else ()),
        Blank(state_key(key, options.quant_type), u8, (MAX_STATE_BYTES,), is_text=True),
    )


def fill(
    sinks: Mapping[str, Sink],
    key: str,
    shape: tuple[int, ...],
    dtype: DType,
    options: FourBitOptions,
    pieces: Iterable[NDArray[Any]],
) -> QuantisationLoss:
    """Quantise a weight and write all its tensors; returns what was lost.

    Args:
        sinks: where, by the keys of `blanks`.
        key: name of the weight.
        shape: its dimensions.
        dtype: recorded as the type that it is read back to.
        options: how to quantise.
        pieces: all its values in row-major order.

    Raises:
        AdapterError: NaN or infinite values, or not as many as `shape` says.
    """
    quantizer = StreamingQuantizer(key, math.prod(shape), options)
    position = 0
    for piece in pieces:
        for packed in quantizer.push(piece):
            sinks[key].write_at(position, packed.data)
            position += packed.nbytes
    scales = quantizer.finish()
    nested = scales.nested
    if nested is None:
        _write(sinks[f"{key}.absmax"], scales.absmax)
    else:
        _write(sinks[f"{key}.absmax"], nested.codes)
        _write(sinks[f"{key}.nested_absmax"], nested.absmax)
        _write(sinks[f"{key}.nested_quant_map"], dynamic_map())
    _write(sinks[f"{key}.quant_map"], four_bit(options.quant_type).codebook)
    offset = None if nested is None else nested.offset
    text = state_json(options.quant_type, options.blocksize, dtype, shape, offset)
    sinks[state_key(key, options.quant_type)].write_at(0, text)
    return scales.loss


def _write(sink: Sink, values: NDArray[Any]) -> None:
    sink.write_at(0, np.ascontiguousarray(values).view(np.uint8).data)


class Kept:
    """A sink that keeps what is written, to be read again.

    Args:
        blank: the tensor.
        beyond: where bytes are passed on to; None if nowhere.
    """

    def __init__(self, blank: Blank, beyond: Sink | None = None) -> None:
        self._blank, self._beyond = blank, beyond
        self._data = bytearray() if blank.is_text else bytearray(blank.nbytes)

    def write_at(self, offset: int, data: Buffer) -> None:
        """Take bytes."""
        view = memoryview(data).cast("B")
        self._data[offset : offset + len(view)] = view
        if self._beyond is not None:
            self._beyond.write_at(offset, data)

    def tensor(self) -> TensorRef:
        """Return what was written."""
        shape = (len(self._data),) if self._blank.is_text else self._blank.shape
        return TensorRef(self._blank.key, self._blank.dtype, shape, lambda: self._data)
