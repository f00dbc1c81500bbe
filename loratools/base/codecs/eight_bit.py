"""Eight-bit floats times scales, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from loratools.base.codecs.bits import powers
from loratools.base.codecs.codec import Codec, CodedWeight, Scheme, Stored
from loratools_formats.checkpoints.eight_bit_floats import METHODS, Fp8Weight, fp8_weights
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

# What compressed-tensors and ModelOpt call their variants in eight-bit floats.
_VARIANTS = {
    "format": ("dense", "float-quantized", "naive-quantized", "mxfp8-quantized"),
    "quant_algo": ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"),
}
_NAMES = {"F8_E4M3": "FP8 (E4M3)", "F8_E5M2": "FP8 (E5M2)"}


class EightBitWeight(CodedWeight):
    """A weight in eight-bit floats.

    Args:
        weight: where it is stored.
    """

    def __init__(self, weight: Fp8Weight) -> None:
        self.weight = weight
        values = weight.values
        group = None if weight.block is None else weight.block[1]
        scheme = Scheme(_NAMES[values.dtype.code], 8, group)
        parts = (values, *weight.parts)
        super().__init__(values.key, values.shape, DTYPES["F32"], parts, scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32."""
        width = self.shape[-1]
        return self.elements(start * width, stop * width).reshape(stop - start, width)

    def elements(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) of the flat weight in float32."""
        weight = self.weight
        codes: Array = np.take(
            _table(weight.values.dtype.code),
            np.frombuffer(weight.values.raw_range(start, stop), np.uint8),
        )
        *_, out, in_ = weight.values.shape if len(weight.values.shape) > 1 else (1, stop)
        scale = _numbers(weight.scale).reshape(-1)
        if weight.block is None:
            one = scale[0] if len(scale) == 1 else scale[np.arange(start, stop) // (out * in_)]
            codes *= one
            return self._of_inputs(codes, start, in_)
        rows, columns = weight.block
        across = -(-in_ // columns)
        first, last = start // in_, -(-stop // in_)
        lines = np.arange(first, last)
        grid = scale.reshape(-1, across)
        of_line = lines // out * -(-out // rows) + lines % out // rows
        spread = np.repeat(grid[of_line], columns, axis=1)[:, :in_].reshape(-1)
        codes *= spread[start - first * in_ : stop - first * in_]
        return self._of_inputs(codes, start, in_)

    def _of_inputs(self, values: Array, start: int, width: int) -> Array:
        """Multiply elements from `start`, of rows of `width`, with the scale of inputs."""
        if self.weight.of_inputs is not None:
            scale = np.broadcast_to(self.weight.of_inputs.load(np.float32).reshape(-1), width)
            values *= scale[np.arange(start, start + len(values)) % width]
        return values


@cache
def _table(code: str) -> Array:
    """Return what each byte means: F32 (256,)."""
    table: Array = np.arange(256, dtype=np.uint8).view(DTYPES[code].numpy_dtype())
    return table.astype(np.float32)


def _numbers(scale: TensorRef) -> Array:
    """Return scales in float32; bytes are exponents of two, where 127 stands for one."""
    if scale.dtype.code == "U8":
        return powers(scale.load())
    values: Array = scale.load(np.float32)
    return values


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    try:
        weights = fp8_weights(stored.tensors, stored.config)
    except UnsupportedError:
        if _is_of_others(stored.stated):
            return {}
        raise
    return {key: EightBitWeight(weight) for key, weight in weights.items()}


def _is_of_others(stated: Mapping[str, Any]) -> bool:
    """Return whether a configuration says that weights are in another format."""
    method = stated.get("quant_method", METHODS[0])
    return method not in METHODS or any(
        stated.get(entry) not in (None, *words) for entry, words in _VARIANTS.items()
    )


CODEC = Codec("eight-bit floats", METHODS, _declare)
