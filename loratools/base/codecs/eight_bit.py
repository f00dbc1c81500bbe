"""Eight-bit floats times scales, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loratools.base.codecs.bits import powers, small_floats
from loratools.base.codecs.codec import (
    Codec,
    CodedWeight,
    CodesOnly,
    Encoded,
    Encoder,
    Scheme,
    Stored,
    row_piece,
)
from loratools.base.codecs.levels import float_codes
from loratools.base.codecs.parts import matrix_rows
from loratools.base.codecs.transposed import Transposed
from loratools_formats.checkpoints.eight_bit_floats import METHODS, Fp8Weight, fp8_weights
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

# What compressed-tensors and ModelOpt call their variants in eight-bit floats.
_VARIANTS = {
    "format": ("dense", "float-quantized", "naive-quantized", "mxfp8-quantized"),
    "quant_algo": ("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"),
}
_OF_LINEAR_LAYERS = "auto_round:llm_compressor"
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
        group = None if group == values.shape[-1] else group
        scheme = Scheme(_NAMES[values.dtype.code], 8, group)
        parts = (values, *weight.parts)
        super().__init__(values.key, values.shape, DTYPES["F32"], parts, scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32."""
        codes = matrix_rows(self.weight.values, start, stop).view(np.uint8)
        return self._meant(codes, *self._grid(start, stop))

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales."""
        return CodesOnly(self.weight.values, self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        grid, columns = self._grid(start, start + len(values))
        inputs = self._of_inputs()
        wanted = values.copy() if inputs is None else values / inputs
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            _combine(np.divide, wanted, grid, columns)
        codes = float_codes(wanted, self.weight.values.dtype.code)
        stored = [row_piece(self.weight.values, start, codes)]
        return Encoded(self._meant(codes, grid, columns), stored)

    def _meant(self, codes: Array, grid: Array, columns: int) -> Array:
        """Return code · scale, and times the scale of inputs if there is one."""
        values = small_floats(codes, self.weight.values.dtype.code)
        _combine(np.multiply, values, grid, columns)
        inputs = self._of_inputs()
        return values if inputs is None else np.multiply(values, inputs, out=values)

    def _grid(self, start: int, stop: int) -> tuple[Array, int]:
        """Return the scales of rows, (rows or 1, groups), and how many columns share one."""
        weight, width = self.weight, self.shape[-1]
        out = self.shape[-2] if len(self.shape) > 1 else 1
        if weight.scale.numel == 1:
            return _numbers(weight.scale, 0, 1), width
        rows, columns = weight.block or (out, width)
        across = -(-width // columns)
        lines = np.arange(start, stop)
        lines = lines // out * -(-out // rows) + lines % out // rows
        first, last = int(lines[0]), int(lines[-1]) + 1
        numbers = _numbers(weight.scale, first * across, last * across)
        spread: Array = numbers.reshape(-1, across)[lines - first]
        return spread, columns

    def _of_inputs(self) -> Array | None:
        """Return the scale of inputs: F32 (in,) or (1,)."""
        found = self.weight.of_inputs
        return None if found is None else found.load(np.float32).reshape(-1)


def _combine(operation: np.ufunc, values: Array, grid: Array, columns: int) -> None:
    """Multiply or divide rows in place with scales, of which each is for some columns."""
    grid = grid.reshape(-1, grid.shape[-1])
    width = values.shape[1]
    if grid.shape[1] == 1:
        operation(values, grid, out=values)
        return
    whole = width // columns
    grouped = values[:, : whole * columns].reshape(len(values), whole, columns)
    if np.shares_memory(grouped, values):
        operation(grouped, grid[:, :whole, None], out=grouped)
    else:
        values[:, : whole * columns] = operation(grouped, grid[:, :whole, None]).reshape(
            len(values), -1
        )
    if whole < grid.shape[1]:
        rest = values[:, whole * columns :]
        operation(rest, grid[:, whole:], out=rest)


def _numbers(scale: TensorRef, start: int, stop: int) -> Array:
    """Return some scales in float32; bytes are exponents of two, where 127 stands for one."""
    stored = scale.elements(start, stop)
    return powers(stored) if scale.dtype.code == "U8" else stored.astype(np.float32)


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    try:
        weights = fp8_weights(stored.tensors, stored.config)
    except UnsupportedError:
        if _is_of_others(stored.stated):
            return {}
        raise
    return {key: _as_held(EightBitWeight(weight), stored) for key, weight in weights.items()}


def _as_held(weight: CodedWeight, stored: Stored) -> CodedWeight:
    """Return a weight as the model holds it.

    Eight-bit floats have the name and the shape of the plain weight, Conv1D's too. AutoRound makes
    linear layers of these where it has scales of groups.
    """
    is_linear = stored.stated.get("packing_format") == _OF_LINEAR_LAYERS
    is_transposed = is_linear and len(weight.shape) == 2 and is_conv1d(weight.key, stored.config)
    return Transposed(weight) if is_transposed else weight


def _is_of_others(stated: Mapping[str, Any]) -> bool:
    """Return whether a configuration says that weights are in another format."""
    method = stated.get("quant_method", METHODS[0])
    return method not in METHODS or any(
        stated.get(entry) not in (None, *words) for entry, words in _VARIANTS.items()
    )


CODEC = Codec("eight-bit floats", METHODS, _declare, keeps_conv1d=True)
