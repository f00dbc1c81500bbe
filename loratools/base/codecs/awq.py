"""AWQ as AutoAWQ stores it: versions gemm and gemv, four bits.

gemm has `qweight` I32 (in, out / 8), `qzeros` I32 (groups, out / 8) and `scales` (groups, out); the
nibbles of a word hold its eight columns in the order 0 2 4 6 1 3 5 7. gemv has `qweight` I32 (out,
in / 8), `qzeros` I32 (out, Z) and `scales` (out, 8 · Z), in plain order, where groups are padded. A
value is scale · (code − zero), rounded to the type of the scales.

What the weights mean is what is stored: AWQ has scaled columns and the layers before them, so that
they are not near those of the original model, to which an adapter may belong.

Source: autoawq 0.2.9, `WQLinear_GEMM` and `WQLinear_GEMV`.
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
from loratools_formats.core.dtypes import Array, DType
from loratools_formats.core.tensors import TensorRef

_CAVEAT = (
    "AWQ scaled the inputs of layers; an adapter that was trained on the original model, not on "
    "this one, does not fit it"
)
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each column of a word
_FLOATING = ("F16", "BF16", "F32")
_GROUPS = (32, 64, 128)
_PAD = {128: 1, 64: 2, 32: 4}
_BITS, _TOP = 4, 15
_TOGETHER = 256  # outputs encoded together: half of them, in bytes, lie side by side


class _Gemm(CodedWeight):
    """Codes stored as (in, out), eight outputs in a word."""

    caveat = _CAVEAT
    together = 8

    def __init__(self, key: str, parts: Mapping[str, TensorRef]) -> None:
        codes, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        height, out = codes.shape[0], scales.shape[1]
        self._groups = scales.shape[0]
        self._codes = Columns(codes, height, codes.shape[1] * 4)
        self._zeros = Columns(zeros, self._groups, codes.shape[1] * 4)
        self._scales = Columns(scales, self._groups, out * scales.dtype.bits // 8)
        scheme = Scheme("AWQ gemm", 4, height // self._groups)
        super().__init__(key, (out, height), scales.dtype, parts.values(), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32 or in the type of the scales, to which they are rounded."""
        codes = self._ordered(self._codes, start, stop)
        return above_zeros(codes, _BITS, *self._grid(start, stop), self.dtype)

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales and zeros."""
        return CodesOnly(self.parts[0], self.scheme, self._encoded, _TOGETHER)

    def _encoded(self, start: int, values: Array) -> Encoded:
        codes, meant = _nearest(values, *self._grid(start, start + len(values)), self.dtype)
        words = np.zeros((len(codes) // 8, codes.shape[1]), np.uint32)
        eights = codes.reshape(-1, 8, codes.shape[1])
        for column, nibble in enumerate(_ORDER):
            words |= eights[:, column].astype(np.uint32) << np.uint32(4 * nibble)
        data = np.ascontiguousarray(words.T).view(np.uint8)
        pieces = stripes(self.parts[0], self.shape[0] // 2, start // 2, data)
        return Encoded(meant, pieces)

    def _grid(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and zeros of outputs: F32 (outputs, groups)."""
        zeros = self._ordered(self._zeros, start, stop).astype(np.float32)
        size = self.dtype.bits // 8
        stored = np.ascontiguousarray(self._scales.read(start * size, stop * size))
        scales = stored.view(self.dtype.numpy_dtype()).astype(np.float32).T
        return np.ascontiguousarray(scales), zeros

    def _ordered(self, words: Columns, start: int, stop: int) -> Array:
        """Return the codes of outputs: U16 (outputs, rows of words)."""
        first, last = start // 8, -(-stop // 8)
        data = np.ascontiguousarray(words.read(first * 4, last * 4)).view(np.uint32)
        turned = np.ascontiguousarray(data.T)
        halves = turned.astype(np.uint16), (turned >> np.uint32(16)).astype(np.uint16)
        codes = np.empty((last - first, 8, turned.shape[1]), np.uint16)
        for column, nibble in enumerate(_ORDER):
            half, place = divmod(nibble, 4)
            np.right_shift(halves[half], np.uint16(_BITS * place), out=codes[:, column])
        codes &= np.uint16(_TOP)
        ordered: Array = codes.reshape(-1, turned.shape[1])
        return ordered[start - first * 8 : stop - first * 8]


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
        codes = unpacked(data, _BITS, self.shape[1], np.uint16)
        return above_zeros(codes, _BITS, *self._grid(start, stop), self.dtype)

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales and zeros."""
        return CodesOnly(self.parts[0], self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        codes, meant = _nearest(values, *self._grid(start, start + len(values)), self.dtype)
        pieces = [row_piece(self.parts[0], start, packed(codes, _BITS))]
        return Encoded(meant, pieces)

    def _grid(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and zeros of outputs: F32 (outputs, groups)."""
        data = matrix_rows(self._zeros, start, stop).view(np.uint8)
        zeros = unpacked(data, _BITS, self._groups).astype(np.float32)
        scales = matrix_rows(self._scales, start, stop)[:, : self._groups].astype(np.float32)
        return scales, zeros


def _nearest(values: Array, scales: Array, zeros: Array, dtype: DType) -> tuple[Array, Array]:
    """Return the codes of rows, and what they mean: U8 and F32 (rows, width)."""
    grouped = values.reshape(*scales.shape, -1)
    codes = integer_codes(grouped, scales, zeros, _TOP).reshape(values.shape)
    meant = above_zeros(codes.astype(np.uint16), _BITS, scales, zeros, dtype)
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
        if _is_gemm(codes, zeros, scales) and stored.stated.get("version") != "gemv":
            sibling(stored.tensors, scales.key, _FLOATING)
            found[key] = _Gemm(key, parts)
        elif len({part.shape[0] for part in parts.values()}) == 1:
            sibling(stored.tensors, scales.key, _FLOATING)
            found[key] = _Gemv(key, parts, _groups_of_gemv(parts, stored.stated))
    return found


def _is_gemm(codes: TensorRef, zeros: TensorRef, scales: TensorRef) -> bool:
    groups, out = scales.shape
    return (
        codes.shape[1] * 8 == out
        and zeros.shape == (groups, codes.shape[1])
        and groups > 0
        and codes.shape[0] % groups == 0
    )


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
