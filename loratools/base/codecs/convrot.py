"""ComfyUI's ConvRot: integers of a weight whose inputs are rotated, in eight and in four bits.

Each `convrot_groupsize` inputs, a power of four, are multiplied with the Kronecker power of the
regular Hadamard matrix of four, divided so that it is orthogonal; it is its own inverse. The model
rotates what it is given in the same way, so that the weight which acts is code · scale, rotated.
`weight` I8 holds (out, in) codes in `int8_tensorwise`, or (out, in / 2) bytes of two in
`convrot_w4a4`, the first in the low half; `weight_scale` has one number, or one for each output.

The rotation is computed by sums of four, in one order whatever the number of rows. The library
multiplies with the matrix: the two agree up to a few roundings in float32.

Source: comfy-kitchen 0.2.40 (`tensor/int8_utils.py`, `backends/eager/convrot_w4a4.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loratools.base.codecs.bits import numbers, packed
from loratools.base.codecs.codec import (
    CodedWeight,
    CodesOnly,
    Encoded,
    Encoder,
    Scheme,
    row_piece,
)
from loratools.base.codecs.levels import integer_codes
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, OF_MODELS, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

_GROUP = 256
_FOUR, _EIGHT = 4, 8
_OF_FOUR_BITS = "convrot_w4a4"


class _Rotated(CodedWeight):
    """code · scale, rotated along the inputs."""

    def __init__(self, key: str, codes: TensorRef, scale: TensorRef, group: int, bits: int) -> None:
        self._codes, self._scale, self._group, self._bits = codes, scale, group, bits
        shape = (codes.shape[0], codes.shape[1] * _EIGHT // bits)
        scheme = Scheme(f"ConvRot INT{bits}", bits)
        super().__init__(key, shape, DTYPES["F32"], (codes, scale), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32."""
        stored = matrix_rows(self._codes, start, stop)
        if self._bits == _EIGHT:
            return self._meant(stored.astype(np.float32), start)
        half = 1 << (_FOUR - 1)  # the codes are signed: their highest bit is turned
        data = stored.view(np.uint8) ^ np.uint8(half | half << _FOUR)
        return self._meant(numbers(data, _FOUR, self.shape[1], half), start)

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales."""
        return CodesOnly(self._codes, self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        half = 1 << (self._bits - 1)
        wanted = rotated(values, self._group)[:, None, :]
        scales = self._scales(start, len(values))
        codes = integer_codes(wanted, scales, float(half), 2 * half - 1)[:, 0]
        meant = self._meant(codes.astype(np.float32) - np.float32(half), start)
        signed = codes ^ np.uint8(half)
        return Encoded(meant, [row_piece(self._codes, start, packed(signed, self._bits))])

    def _meant(self, codes: Array, start: int) -> Array:
        codes *= self._scales(start, len(codes))
        return rotated(codes, self._group)

    def _scales(self, start: int, count: int) -> Array:
        """Return the scales of rows: F32 (rows or 1, 1)."""
        first, last = (0, 1) if self._scale.numel == 1 else (start, start + count)
        scales = self._scale.elements(first, last).astype(np.float32).reshape(-1, 1)
        return np.broadcast_to(scales, (count, 1))


def rotated(values: Array, group: int) -> Array:
    """Return rows with each `group` of their columns rotated; twice gives the rows again.

    Args:
        values: F32 (rows, width), a whole number of groups.
        group: a power of four.
    """
    stride = 1
    while stride < group:
        fours = values.reshape(-1, 4, stride)
        half = (fours[:, 0] + fours[:, 1] + (fours[:, 2] + fours[:, 3])) * np.float32(0.5)
        values = (half[:, None] - fours[:, ::-1]).reshape(values.shape)
        stride *= 4
    return values


def rotated_weight(
    tensors: Mapping[str, TensorRef], codes: TensorRef, form: str, said: Mapping[str, Any]
) -> CodedWeight:
    """Return a weight that a description says to be rotated.

    Args:
        tensors: those of the checkpoint.
        codes: the stored codes.
        form: the format's name.
        said: what the description says, inner entries included.

    Raises:
        AdapterError: the tensors or the size of groups do not fit.
    """
    bits = _FOUR if form == _OF_FOUR_BITS else _EIGHT
    sibling(tensors, codes.key, ("I8",))
    if len(codes.shape) != 2 or not all(codes.shape):
        raise wrong_shape(codes, "(out, in)")
    scale = sibling(tensors, f"{codes.key}_scale", OF_MODELS)
    if scale.numel not in (1, codes.shape[0]):
        raise wrong_shape(scale, f"1 or {codes.shape[0]} numbers")
    group, width = said.get("convrot_groupsize", _GROUP), codes.shape[1] * _EIGHT // bits
    is_power = type(group) is int and group >= 4 and group & (group - 1) == 0
    if not is_power or group.bit_length() % 2 == 0 or width % group:
        raise AdapterError(
            "the groups that a weight is rotated in do not fit it",
            tensor=codes.key,
            got=group,
            expected=f"a power of four that divides {width} columns",
        )
    return _Rotated(codes.key, codes, scale, group, bits)
