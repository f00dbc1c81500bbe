"""AWQ as AutoAWQ stores it: versions gemm and gemv, four bits; AutoRound stores up to seven bits.

gemm has `qweight` I32 (in, out / 8), `qzeros` I32 (groups, out / 8) and `scales` (groups, out); the
nibbles of a word hold its eight columns in the order 0 2 4 6 1 3 5 7. AutoRound's five to seven
bits are a stream along the row, in which each eight columns have that order. gemv has `qweight` I32
(out, in / 8), `qzeros` I32 (out, Z) and `scales` (out, 8 · Z), in plain order, where groups are
padded. A value is scale · (code − zero), rounded to the type of the scales.

What the weights mean is what is stored: AWQ has scaled columns and the layers before them, so that
they are not near those of the original model, to which an adapter may belong.

Sources: autoawq 0.2.9, `WQLinear_GEMM` and `WQLinear_GEMV`; auto-round 0.16 (`pack_awq_bitstream`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loratools.base.codecs.bits import above_zeros, packed, unpacked
from loratools.base.codecs.codec import (
    Codec,
    CodedWeight,
    CodesOnly,
    Encoded,
    Encoder,
    Scheme,
    Stored,
    row_piece,
    stripes,
)
from loratools.base.codecs.levels import integer_codes, rounded
from loratools.base.codecs.parts import Columns, matrix_rows
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import OF_MODELS, Array, DType
from loratools_formats.core.tensors import TensorRef

_CAVEAT = (
    "AWQ scaled the inputs of layers; an adapter that was trained on the original model, not on "
    "this one, does not fit it"
)
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place of each of eight columns
_GROUPS = (32, 64, 128)
_PAD = {128: 1, 64: 2, 32: 4}
_FOUR = 4
_BITS = (_FOUR, 5, 6, 7)
_EIGHT = 8
_TOGETHER = 256  # outputs encoded together: their bytes lie side by side


class _Gemm(CodedWeight):
    """Codes stored as (in, out), a stream along the outputs."""

    caveat = _CAVEAT
    together = _EIGHT

    def __init__(self, key: str, parts: Mapping[str, TensorRef], bits: int) -> None:
        codes, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        height, out = codes.shape[0], scales.shape[1]
        self._groups, self._bits = scales.shape[0], bits
        self._codes = Columns(codes, height, codes.shape[1] * 4)
        self._zeros = Columns(zeros, self._groups, codes.shape[1] * 4)
        self._scales = Columns(scales, self._groups, out * scales.dtype.bits // 8)
        scheme = Scheme("AWQ gemm", bits, height // self._groups)
        super().__init__(key, (out, height), scales.dtype, parts.values(), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32 or in the type of the scales, to which they are rounded."""
        codes = self._ordered(self._codes, start, stop)
        return above_zeros(codes, self._bits, *self._grid(start, stop), self.dtype)

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales and zeros."""
        return CodesOnly(self.parts[0], self.scheme, self._encoded, _TOGETHER)

    def _encoded(self, start: int, values: Array) -> Encoded:
        grid = self._grid(start, start + len(values))
        codes, meant = _nearest(values, *grid, self._bits, self.dtype)
        placed = np.empty_like(codes).reshape(-1, _EIGHT, codes.shape[1])
        placed[:, _ORDER] = codes.reshape(placed.shape)
        data = packed(np.ascontiguousarray(placed.reshape(codes.shape).T), self._bits)
        width = self.shape[0] * self._bits // 8
        pieces = stripes(self.parts[0], width, start * self._bits // 8, data)
        return Encoded(meant, pieces)

    def _grid(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and zeros of outputs: F32 (outputs, groups)."""
        zeros = self._ordered(self._zeros, start, stop).astype(np.float32)
        size = self.dtype.bits // 8
        stored = np.ascontiguousarray(self._scales.read(start * size, stop * size))
        scales = stored.view(self.dtype.numpy_dtype()).astype(np.float32).T
        return np.ascontiguousarray(scales), zeros

    def _ordered(self, stored: Columns, start: int, stop: int) -> Array:
        """Return the codes of outputs: U16 (outputs, stored rows)."""
        first, last = start // _EIGHT, -(-stop // _EIGHT)
        data = np.ascontiguousarray(stored.read(first * self._bits, last * self._bits))
        codes = _of_nibbles(data) if self._bits == _FOUR else _of_stream(data, self._bits)
        ordered: Array = codes.reshape(-1, len(data))
        return ordered[start - first * _EIGHT : stop - first * _EIGHT]


def _of_nibbles(data: Array) -> Array:
    """Return codes of four bits: U16 (eights, 8, rows), of U8 (rows, bytes)."""
    turned = np.ascontiguousarray(data.view(np.uint32).T)
    halves = turned.astype(np.uint16), (turned >> np.uint32(16)).astype(np.uint16)
    codes = np.empty((len(turned), _EIGHT, turned.shape[1]), np.uint16)
    for column, nibble in enumerate(_ORDER):
        half, place = divmod(nibble, 4)
        np.right_shift(halves[half], np.uint16(_FOUR * place), out=codes[:, column])
    codes &= np.uint16(15)
    return codes


def _of_stream(data: Array, bits: int) -> Array:
    """Return codes that straddle bytes: U16 (eights, 8, rows), of U8 (rows, bytes)."""
    codes = unpacked(data, bits, data.shape[1] * 8 // bits, np.uint16)
    turned = np.ascontiguousarray(codes.T).reshape(-1, _EIGHT, len(data))
    return turned[:, _ORDER]


class _Gemv(CodedWeight):
    """Codes stored as (out, in), eight inputs in a word."""

    caveat = _CAVEAT

    def __init__(self, key: str, parts: Mapping[str, TensorRef], groups: int) -> None:
        codes, self._zeros, self._scales = parts["qweight"], parts["qzeros"], parts["scales"]
        self._codes, self._groups = codes, groups
        out, width = codes.shape[0], codes.shape[1] * 8
        scheme = Scheme("AWQ gemv", 4, width // groups)
        super().__init__(key, (out, width), self._scales.dtype, parts.values(), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32 or in the type of the scales, to which they are rounded."""
        data = matrix_rows(self._codes, start, stop).view(np.uint8)
        codes = unpacked(data, _FOUR, self.shape[1], np.uint16)
        return above_zeros(codes, _FOUR, *self._grid(start, stop), self.dtype)

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales and zeros."""
        return CodesOnly(self.parts[0], self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        grid = self._grid(start, start + len(values))
        codes, meant = _nearest(values, *grid, _FOUR, self.dtype)
        pieces = [row_piece(self.parts[0], start, packed(codes, _FOUR))]
        return Encoded(meant, pieces)

    def _grid(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and zeros of outputs: F32 (outputs, groups)."""
        data = matrix_rows(self._zeros, start, stop).view(np.uint8)
        zeros = unpacked(data, _FOUR, self._groups).astype(np.float32)
        scales = matrix_rows(self._scales, start, stop)[:, : self._groups].astype(np.float32)
        return scales, zeros


def _nearest(
    values: Array, scales: Array, zeros: Array, bits: int, dtype: DType
) -> tuple[Array, Array]:
    """Return the codes of rows, and what they mean: U8 and F32 (rows, width)."""
    grouped = values.reshape(*scales.shape, -1)
    codes = integer_codes(grouped, scales, zeros, (1 << bits) - 1).reshape(values.shape)
    meant = above_zeros(codes.astype(np.uint16), bits, scales, zeros, dtype)
    return codes, rounded(meant, dtype)


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for module, codes in stored.named(".qweight").items():
        names = {leaf: f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales")}
        parts = {leaf: stored.tensors[n] for leaf, n in names.items() if n in stored.tensors}
        if len(parts) < 3 or any(len(part.shape) != 2 for part in parts.values()):
            continue
        zeros, scales = parts["qzeros"], parts["scales"]
        if codes.dtype.code != "I32" or zeros.dtype.code != "I32":
            continue
        key = f"{module}.weight"
        bits = _bits_of_gemm(codes, zeros, scales)
        if bits is not None and stored.stated.get("version") != "gemv":
            sibling(stored.tensors, scales.key, OF_MODELS)
            found[key] = _Gemm(key, parts, bits)
        elif len({part.shape[0] for part in parts.values()}) == 1:
            sibling(stored.tensors, scales.key, OF_MODELS)
            found[key] = _Gemv(key, parts, _groups_of_gemv(parts, stored.stated))
    return found


def _bits_of_gemm(codes: TensorRef, zeros: TensorRef, scales: TensorRef) -> int | None:
    """Return the bits of a code; None if the shapes are not those of gemm."""
    groups, out = scales.shape
    fits = [bits for bits in _BITS if codes.shape[1] * 32 == out * bits and out % _EIGHT == 0]
    has_groups = groups > 0 and codes.shape[0] % groups == 0
    return fits[0] if fits and has_groups and zeros.shape == (groups, codes.shape[1]) else None


def _groups_of_gemv(parts: Mapping[str, TensorRef], stated: Mapping[str, Any]) -> int:
    """Return how many groups a row has, of which more are stored.

    Raises:
        AdapterError: no size of groups fits.
    """
    width, words = parts["qweight"].shape[1] * 8, parts["qzeros"].shape[1]
    asked = stated.get("group_size", stated.get("q_group_size"))
    for size in (asked, *_GROUPS) if asked in _GROUPS else _GROUPS:
        groups = width // size
        padded = math.ceil(groups / 8 / _PAD[size]) * _PAD[size]
        if width % size == 0 and padded == words and parts["scales"].shape[1] == words * 8:
            return groups
    raise wrong_shape(parts["qzeros"], f"the padded groups of {width} columns")


CODEC = Codec("AWQ", ("awq",), _declare)
