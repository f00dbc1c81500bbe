"""torchao's tensors as transformers saves them: Int8Tensor, Float8Tensor, IntxUnpackedToInt8Tensor.

A weight X.weight is stored as `X._weight_qdata` (out, in), `X._weight_scale` and, of integers,
`X._weight_zero_point`, both for blocks of the weight. The file's metadata says under X.weight which
kind it is, how large blocks are, and which type its values are rounded to: (code − zero) · scale
in float32, rounded once. Integers of fewer bits take a byte each.

Source: torchao 0.18, `prototype/safetensors` and the tensors' `dequantize`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from loratools.base.codecs.bits import small_floats
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
from loratools.base.codecs.levels import float_codes, integer_codes, rounded
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.siblings import missing_part, sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, OF_MODELS, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError
from loratools_formats.disk.strict_json import parsed_object

_CODES = re.compile(r"(.+)\._([a-z_]+)_qdata")
_KINDS = {
    "Int8Tensor": ("I8",),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Float8Tensor": ("F8_E4M3", "F8_E5M2"),
}
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_OF_RUNNING = ("act_quant_scale", "act_quant_zero_point")
_OF_INPUTS = "act_pre_scale"
_INTX = re.compile(r"int([1-8])")


class _TorchAo(CodedWeight):
    """(code − zero) · scale of blocks."""

    def __init__(
        self,
        key: str,
        parts: Mapping[str, TensorRef],
        dtype: str,
        scheme: Scheme,
        block: tuple[int, int],
    ) -> None:
        self._codes, self._scale, self._zero = (
            parts["qdata"], parts["scale"], parts.get("zero_point"),
        )  # fmt: skip
        self._block = block
        super().__init__(key, self._codes.shape, DTYPES[dtype], parts.values(), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32, to be rounded to the type of the values."""
        stored = matrix_rows(self._codes, start, stop)
        return self._meant(stored, *self._grid(start, stop))

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales and zeros."""
        return CodesOnly(self._codes, self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        scales, zeros = self._grid(start, start + len(values))
        grouped = values.reshape(*scales.shape, -1)
        if self._codes.dtype.floating:
            with np.errstate(divide="ignore", invalid="ignore"):
                bytes_ = float_codes(grouped / scales[:, :, None], self._codes.dtype.code)
            codes = bytes_.view(self._codes.dtype.numpy_dtype())
        else:
            half = 1 << (self.scheme.bits - 1)
            middle = np.zeros_like(scales) if zeros is None else zeros
            above = integer_codes(grouped, scales, middle + np.float32(half), 2 * half - 1)
            codes = (above.astype(np.int16) - half).astype(np.int8)
        codes = codes.reshape(values.shape)
        meant = rounded(self._meant(codes, scales, zeros), self.dtype)
        return Encoded(meant, [row_piece(self._codes, start, codes)])

    def _meant(self, codes: Array, scales: Array, zeros: Array | None) -> Array:
        if self._codes.dtype.floating:
            values = small_floats(codes.view(np.uint8), self._codes.dtype.code)
        else:
            values = codes.astype(np.float32)
        grouped = values.reshape(*scales.shape, -1)
        if zeros is not None:
            grouped -= zeros[:, :, None]
        grouped *= scales[:, :, None]
        return values

    def _grid(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """Return the scales and zeros of rows: F32 (rows, groups)."""
        across = self.shape[1] // self._block[1]
        lines = np.arange(start, stop) // self._block[0]
        first, last = start // self._block[0], -(-stop // self._block[0])

        def read(tensor: TensorRef) -> Array:
            stored = tensor.elements(first * across, last * across).astype(np.float32)
            numbers: Array = stored.reshape(-1, across)[lines - first]
            return numbers

        return read(self._scale), None if self._zero is None else read(self._zero)


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for name, codes in stored.tensors.items():
        named = _CODES.fullmatch(name)
        if named is None:
            continue
        key = f"{named[1]}.{named[2]}"
        text = stored.metadata.get(key)
        if text is None:
            continue
        said = parsed_object(text.encode(), f"metadata {key}", path=None, max_depth=16)
        found[key] = _weight(stored, key, f"{named[1]}._{named[2]}_", codes, said)
    return found


def _weight(
    stored: Stored, key: str, prefix: str, codes: TensorRef, said: Mapping[str, Any]
) -> CodedWeight:
    """Return a weight as its metadata describes it.

    Raises:
        AdapterError: the tensors contradict each other.
        UnsupportedError: a kind of tensor whose values are not known.
    """
    kind, data = said.get("_type"), said.get("_data")
    if kind not in _KINDS or not isinstance(data, Mapping):
        raise UnsupportedError(
            "this tensor of torchao cannot be read",
            tensor=key,
            got=kind,
            expected=", ".join(_KINDS),
            hint="Start from the original checkpoint",
        )
    sibling(stored.tensors, codes.key, _KINDS[kind])
    parts = {"qdata": codes, "scale": sibling(stored.tensors, f"{prefix}scale", OF_MODELS)}
    if f"{prefix}zero_point" in stored.tensors:
        parts["zero_point"] = stored.tensors[f"{prefix}zero_point"]
    _check_named(stored, prefix, said.get("_tensor_data_names"))
    block = _block(data.get("block_size"), codes)
    grid = (codes.shape[0] // block[0], codes.shape[1] // block[1])
    for part in list(parts.values())[1:]:
        if part.numel != grid[0] * grid[1]:
            raise wrong_shape(part, list(grid))
    parts |= {
        n: stored.tensors[f"{prefix}{n}"] for n in _OF_RUNNING if prefix + n in stored.tensors
    }
    if f"{prefix}{_OF_INPUTS}" in stored.tensors:
        raise UnsupportedError(
            "a layer of torchao scales its inputs, so the model computes with another weight",
            tensor=f"{prefix}{_OF_INPUTS}",
            hint="Start from the original checkpoint",
        )
    bits = 8
    if kind == "IntxUnpackedToInt8Tensor":
        target = _INTX.fullmatch(str(_inner(data.get("target_dtype"))))
        if target is None:
            raise UnsupportedError(
                "these integers of torchao are not known", tensor=key, got=data.get("target_dtype")
            )
        bits = int(target[1])
    dtype = _DTYPES.get(str(_inner(data.get("dtype"))))
    if dtype is None:
        raise UnsupportedError(
            "this type of torchao's values is not known", tensor=key, got=data.get("dtype")
        )
    name = "torchao FP8" if codes.dtype.floating else f"torchao INT{bits}"
    return _TorchAo(key, parts, dtype, Scheme(name, bits, block[1]), block)


def _check_named(stored: Stored, prefix: str, named: Any) -> None:
    """Refuse a weight of whose tensors the metadata names more than there are.

    Raises:
        AdapterError: one is missing.
    """
    for name in named if isinstance(named, list) else ():
        if f"{prefix}{name}" not in stored.tensors:
            raise missing_part(f"{prefix}{name}")


def _block(said: Any, codes: TensorRef) -> tuple[int, int]:
    """Return the rows and columns that share a scale.

    Raises:
        AdapterError: they are no whole parts of the weight.
    """
    if (
        not isinstance(said, list)
        or len(said) != 2
        or len(codes.shape) != 2
        or not all(
            type(b) is int and b > 0 and s % b == 0 for b, s in zip(said, codes.shape, strict=True)
        )
    ):
        raise wrong_shape(codes, f"(out, in) in blocks of {said}")
    return said[0], said[1]


def _inner(value: Any) -> Any:
    """Return what metadata says inside of a tagged value, as types are written."""
    return value.get("_data") if isinstance(value, Mapping) else value


def without_marks(metadata: Mapping[str, str], weights: Collection[str]) -> dict[str, str]:
    """Return a file's metadata without what torchao says of weights that are plain now."""
    if not any(key in metadata for key in weights):
        return dict(metadata)
    return {
        key: text
        for key, text in metadata.items()
        if key != "tensor_names" and not text.startswith('{"_type":')
    }


CODEC = Codec("torchao", ("torchao",), _declare, without_marks)
