"""HQQ, as hqq saves it in safetensors; read only.

A weight (out, in) is seen as a matrix of whole groups: (groups, size) for axis 1, (size, groups)
for axis 0, both in the order of its elements. `W_q` holds the codes of that matrix in planes: its
rows are cut into as many equal parts as there are codes in a byte, or ten in a word of 32 bits for
three bits, and the first part has the highest bits. `scale` and `zero` are numbers for each group.
A value is (code − zero), rounded to the type that the layer computes in, times scale, rounded
again. Small tensors beside them say the rest; texts are bytes.

Source: hqq 0.2.8, `HQQLinear.state_dict`, `BitPack` and `Quantizer.dequantize`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from loratools.base.codecs.codec import Codec, CodedWeight, Scheme, Stored
from loratools.base.codecs.levels import rounded
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, OF_MODELS, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

_NUMBERS = ("nbits", "group_size", "axis")
_ABOUT = (
    *_NUMBERS, "shape", "packing", "unpack_view_dtype", "view_as_float", "quant_scale",
    "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config",
    "channel_wise", "optimize", "round_zero",
)  # fmt: skip
_PACKING = re.compile(r"([1-8])bit_(u8|32)")
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "bfloat": "BF16", "float32": "F32"}
_MOST_BYTES = 64


class _Packing(NamedTuple):
    """Bits of a code, and codes in a number."""

    bits: int
    each: int


class _Hqq(CodedWeight):
    """(code − zero) · scale, in a matrix of whole groups."""

    def __init__(
        self,
        key: str,
        parts: Mapping[str, TensorRef],
        shape: tuple[int, int],
        axis: int,
        packing: _Packing,
        scheme: Scheme,
    ) -> None:
        self._codes, self._axis, self._packing = parts["W_q"], axis, packing
        self._scale, self._zero = parts["scale"], parts["zero"]
        self._columns = self._codes.shape[1]
        self._step = self._codes.shape[0]
        dtype = DTYPES[_compute_dtype(parts)]
        super().__init__(key, shape, dtype, parts.values(), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in the type of the values."""
        return matrix_rows(self, start, stop)

    def elements(self, start: int, stop: int) -> Array:
        """Return elements [start, stop) of the flat weight in the type of the values."""
        columns = self._columns
        first, last = start // columns, -(-stop // columns)
        if self._axis == 1:  # rows of the matrix are groups, and short
            values = self._matrix(first, last, 0, columns).reshape(-1)
            values = values[start - first * columns : stop - first * columns]
        else:
            pieces = [
                self._matrix(
                    row, row + 1, max(start - row * columns, 0), min(stop - row * columns, columns)
                ).reshape(-1)
                for row in range(first, last)
            ]
            values = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
        typed: Array = values.astype(self.dtype.numpy_dtype())
        return typed

    def _matrix(self, first: int, last: int, left: int, right: int) -> Array:
        """Return a rectangle of the matrix in float32; all columns if it has several rows."""
        codes = np.empty((last - first, right - left), np.float32)
        bits, each = self._packing
        row = first
        while row < last:
            plane, stored = divmod(row, self._step)
            end = min(last, (plane + 1) * self._step)
            begin = stored * self._columns
            data = self._codes.elements(
                begin + left, begin + (end - row - 1) * self._columns + right
            )
            part = data >> data.dtype.type(bits * (each - 1 - plane))
            part &= data.dtype.type((1 << bits) - 1)
            codes[row - first : end - first] = part.reshape(end - row, -1)
            row = end
        span = (first, last) if self._axis == 1 else (left, right)
        scale, zero = (
            rounded(t.elements(*span).astype(np.float32), self.dtype).reshape(
                (-1, 1) if self._axis == 1 else (1, -1)
            )
            for t in (self._scale, self._zero)
        )
        codes -= zero
        values: Array = rounded(codes, self.dtype) * scale
        return values


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for module, codes in stored.named(".W_q").items():
        names = {leaf: f"{module}.{leaf}" for leaf in ("W_q", "scale", "zero", *_ABOUT)}
        parts = {leaf: stored.tensors[n] for leaf, n in names.items() if n in stored.tensors}
        if {"scale", "zero", "shape", *_NUMBERS} <= set(parts):
            found[f"{module}.weight"] = _weight(module, codes, parts)
    return found


def _weight(module: str, codes: TensorRef, parts: Mapping[str, TensorRef]) -> CodedWeight:
    """Return a weight from what is said beside it.

    Raises:
        AdapterError: the tensors contradict each other.
        UnsupportedError: scales are quantised, or codes are stored as floats.
    """
    for name in ("quant_scale", "quant_zero", "view_as_float"):
        if name in parts and parts[name].numel == 1 and parts[name].load().any():
            raise UnsupportedError(
                f"this variant of HQQ is not known: {name}",
                tensor=codes.key,
                hint="Start from the original checkpoint",
            )
    bits, group, axis = (int(parts[name].load().reshape(-1)[0]) for name in _NUMBERS)
    sizes = parts["shape"].load().reshape(-1).tolist()
    if len(sizes) != 2 or min(sizes) < 1 or axis not in (0, 1) or group < 1:
        raise wrong_shape(parts["shape"], "two sizes, with an axis of 0 or 1")
    out, width = int(sizes[0]), int(sizes[1])
    packing = _packing(parts, bits, codes)
    if out * width % group:
        raise wrong_shape(parts["shape"], f"groups of {group}")
    groups = out * width // group
    height, columns = (group, groups) if axis == 0 else (groups, group)
    expected = (-(-height // packing.each), columns)
    if codes.shape != expected:
        raise wrong_shape(codes, list(expected))
    tensors = {part.key: part for part in parts.values()}
    for name in ("scale", "zero"):
        numbers = sibling(tensors, f"{module}.{name}", OF_MODELS)
        if numbers.numel != groups:
            raise wrong_shape(numbers, f"{groups} numbers")
    scheme = Scheme("HQQ", bits, group)
    return _Hqq(f"{module}.weight", parts, (out, width), axis, packing, scheme)


def _packing(parts: Mapping[str, TensorRef], bits: int, codes: TensorRef) -> _Packing:
    """Return how codes are packed: as is said, else as their bits have it."""
    said = _text(parts.get("packing")) or f"{bits}bit_{'32' if bits == 3 else 'u8'}"
    found = _PACKING.fullmatch("8bit_u8" if said in ("5bit_u8", "6bit_u8", "7bit_u8") else said)
    container = None if found is None else ("I32" if found[2] == "32" else "U8")
    if found is None or codes.dtype.code != container or int(found[1]) not in (1, 2, 3, 4, 8):
        raise UnsupportedError(
            "this packing of HQQ is not known",
            tensor=codes.key,
            got=f"{said} in {codes.dtype.code}",
            expected="1, 2, 4 or 8 bits in U8, or 3 bits in I32",
        )
    width = int(found[1])
    return _Packing(width, 10 if container == "I32" else 8 // width)


def _compute_dtype(parts: Mapping[str, TensorRef]) -> str:
    """Return the type that the layer computes in: as is said, else that of the scales."""
    said = _text(parts.get("compute_dtype")).removeprefix("torch.")
    return _DTYPES.get(said, parts["scale"].dtype.code)


def _text(tensor: TensorRef | None) -> str:
    """Return what bytes say; nothing if they are no short text."""
    if tensor is None or tensor.dtype.code != "U8" or tensor.numel > _MOST_BYTES:
        return ""
    return bytes(tensor.raw()).decode("ascii", "replace")


CODEC = Codec("HQQ", ("hqq",), _declare)
"""hqq's own files; transformers 5 saves none that it loads again."""
