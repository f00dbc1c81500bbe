"""NVFP4 and MXFP8 as ComfyUI stores them, and which of its other formats can be read.

A layer's description names its format. In `nvfp4`, `weight` U8 (out, in / 2) holds E2M1 codes, the
first of two in the high half; `weight_scale` E4M3 has one for each 16 inputs, `weight_scale_2` is a
number over all, and both multiply. In `mxfp8`, `weight` is F8_E4M3 and `weight_scale` E8M0, one for
each 32 inputs. The scales of both are in the order of cuBLAS: tiles of 128 rows and 4 columns, row
r and column c of a tile at 16 · (r mod 32) + 4 · (r div 32) + c, tiles of one band of rows one
behind the other, padded with zeros. Eight-bit floats and integers with a scale are left to the
codecs that read them from others. In ConvRot formats the stored weight is rotated.

Source: comfy-kitchen 0.2.40 (`tensor/nvfp4.py`, `tensor/mxfp8.py`, `float_utils.py`), ComfyUI
`comfy/ops.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from loratools.base.codecs.bits import E2M1, fours, packed, powers, small_floats, times_groups
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
from loratools.base.codecs.levels import float_codes, rounded
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.comfyui import stated_layers, unmarked
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_ROWS, _COLUMNS = 128, 4  # of a tile
_BAND = 32
_E4M3 = "F8_E4M3"
_EXPONENTS = ("F8_E8M0", "U8")
_BY_OTHERS = ("float8_", "int8_tensorwise")
_READ = ("nvfp4", "mxfp8", "int8_tensorwise", "float8_e4m3fn", "float8_e5m2")
_ORIGINAL = "Start from the original checkpoint"


class _Tiles:
    """Scales in the order of cuBLAS.

    Args:
        tensor: the scales, of a byte each.
        rows: of the weight.
        columns: groups of a row.
    """

    def __init__(self, tensor: TensorRef, rows: int, columns: int) -> None:
        across = -(-columns // _COLUMNS)
        whole = -(-rows // _ROWS) * _ROWS, across * _COLUMNS
        if tensor.numel != whole[0] * whole[1]:
            raise wrong_shape(tensor, list(whole))
        self._tensor, self._columns, self._across = tensor, columns, across

    def read(self, start: int, stop: int) -> Array:
        """Return the bytes of rows: U8 (rows, columns)."""
        first, last = start // _ROWS, -(-stop // _ROWS)
        size = self._across * _ROWS * _COLUMNS
        data = np.frombuffer(self._tensor.raw_range(first * size, last * size), np.uint8)
        tiles = data.reshape(last - first, self._across, _BAND, _ROWS // _BAND, _COLUMNS)
        ordered = tiles.transpose(0, 3, 2, 1, 4).reshape(-1, self._across * _COLUMNS)
        begin = first * _ROWS
        found: Array = ordered[start - begin : stop - begin, : self._columns]
        return found


class _Tiled(CodedWeight):
    """A small float times the scale of its group."""

    _codes: TensorRef

    @abstractmethod
    def _grid(self, start: int, stop: int) -> Array:
        """Return the scales of rows: F32 (rows, groups)."""

    @abstractmethod
    def _nearest(self, values: Array, scales: Array) -> tuple[Array, Array]:
        """Return rows as bytes, and what they mean: U8 (rows, bytes) and F32 (rows, width)."""

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales."""
        return CodesOnly(self._codes, self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        scales = self._grid(start, start + len(values))
        grouped = values.reshape(*scales.shape, -1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            data, meant = self._nearest(
                (grouped / scales[:, :, None]).reshape(values.shape), scales
            )
        return Encoded(rounded(meant, self.dtype), [row_piece(self._codes, start, data)])


class _Nvfp4(_Tiled):
    """E2M1 · (scale · number)."""

    def __init__(self, key: str, codes: TensorRef, scales: TensorRef, of_all: TensorRef) -> None:
        out, half = codes.shape
        self._codes, self._of_all = codes, of_all
        self._tiles = _Tiles(scales, out, half // 8)
        scheme = Scheme("NVFP4 of ComfyUI", 4, 16)
        super().__init__(key, (out, half * 2), DTYPES["BF16"], (codes, scales, of_all), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32, to be rounded to BF16."""
        values = fours(_turned(matrix_rows(self._codes, start, stop)), E2M1)
        return times_groups(values, self._grid(start, stop))

    def _grid(self, start: int, stop: int) -> Array:
        number = self._of_all.load(np.float32).reshape(-1)
        scales: Array = small_floats(self._tiles.read(start, stop), _E4M3) * number
        return scales

    def _nearest(self, values: Array, scales: Array) -> tuple[Array, Array]:
        codes = float_codes(values, "F4_E2M1")
        return _turned(packed(codes, 4)), times_groups(E2M1[codes], scales)


class _Mxfp8(_Tiled):
    """E4M3 · scale."""

    def __init__(self, key: str, codes: TensorRef, scales: TensorRef) -> None:
        out, width = codes.shape
        self._codes, self._tiles = codes, _Tiles(scales, out, width // 32)
        scheme = Scheme("MXFP8 of ComfyUI", 8, 32)
        super().__init__(key, codes.shape, DTYPES["BF16"], (codes, scales), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32, to be rounded to BF16."""
        codes = matrix_rows(self._codes, start, stop).view(np.uint8)
        return times_groups(small_floats(codes, _E4M3), self._grid(start, stop))

    def _grid(self, start: int, stop: int) -> Array:
        return powers(self._tiles.read(start, stop))

    def _nearest(self, values: Array, scales: Array) -> tuple[Array, Array]:
        codes = float_codes(values, _E4M3)
        return codes, times_groups(small_floats(codes, _E4M3), scales)


def _turned(data: Array) -> Array:
    """Return bytes with their halves in each other's place."""
    return (data << np.uint8(4)) | (data >> np.uint8(4))


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    layers = stated_layers(stored.tensors, stored.metadata)
    found: dict[str, CodedWeight] = {}
    for module, codes in stored.named(".weight").items() if layers else ():
        said = layers.get(module)
        if said is None:
            _refuse_unmarked(stored, module, codes)
            continue
        form = str(said.get("format"))
        _refuse_rotated(form, said, codes)
        if form.startswith(_BY_OTHERS):
            continue
        if form not in _READ:
            raise UnsupportedError(
                "this format of ComfyUI cannot be read",
                tensor=codes.key,
                got=form,
                expected=", ".join(_READ),
                hint=_ORIGINAL,
            )
        found[codes.key] = _weight(stored, module, codes, form)
        _check_shape(stored, module, found[codes.key], said)
    return found


def _weight(stored: Stored, module: str, codes: TensorRef, form: str) -> CodedWeight:
    kinds, group = (("U8",), 8) if form == "nvfp4" else ((_E4M3,), 32)
    sibling(stored.tensors, codes.key, kinds)
    if len(codes.shape) != 2 or not all(codes.shape) or codes.shape[1] % group:
        raise wrong_shape(codes, f"(out, a multiple of {group})")
    scale = f"{module}.weight_scale"
    if form != "nvfp4":
        return _Mxfp8(codes.key, codes, sibling(stored.tensors, scale, _EXPONENTS))
    scales = sibling(stored.tensors, scale, (_E4M3, "U8"))
    of_all = sibling(stored.tensors, f"{module}.weight_scale_2", ("F32",))
    if of_all.numel != 1:
        raise wrong_shape(of_all, "one number")
    return _Nvfp4(codes.key, codes, scales, of_all)


def _refuse_unmarked(stored: Stored, module: str, codes: TensorRef) -> None:
    """Refuse a quantised weight that ComfyUI would take for a plain one.

    Raises:
        UnsupportedError: it is one.
    """
    scale = stored.tensors.get(f"{module}.weight_scale")
    is_block = scale is not None and scale.dtype.code in _EXPONENTS
    if scale is not None and (codes.dtype.code in ("U8", "I8") or is_block):
        raise UnsupportedError(
            "a quantised weight has no description, although other layers of ComfyUI in the "
            "file have one",
            tensor=codes.key,
            expected=f"{module}.comfy_quant, or an entry in the file's _quantization_metadata",
            hint=_ORIGINAL,
        )


def _refuse_rotated(form: str, said: Mapping[str, Any], codes: TensorRef) -> None:
    """Refuse a weight that is stored rotated, as ConvRot does.

    Raises:
        UnsupportedError: it is.
    """
    inner = said.get("params")
    of_layer = {**said, **(inner if isinstance(inner, Mapping) else {})}
    if "convrot" in form or of_layer.get("convrot") or said.get("convrot"):
        raise UnsupportedError(
            "the weight is stored rotated (convrot), so that a change cannot be added to it",
            tensor=codes.key,
            got=form,
            hint=_ORIGINAL,
        )


def _check_shape(stored: Stored, module: str, weight: CodedWeight, said: Mapping[str, Any]) -> None:
    """Refuse a weight that was padded for the kernels, since its own shape is not stored.

    Raises:
        AdapterError: its bias or its description tells of another shape.
    """
    bias, shape = stored.tensors.get(f"{module}.bias"), said.get("orig_shape")
    is_longer = bias is not None and bias.shape != weight.shape[:1]
    if is_longer or shape not in (None, list(weight.shape)):
        raise AdapterError(
            "a weight that ComfyUI padded cannot be read",
            tensor=weight.key,
            got=list(weight.shape),
            expected=shape if bias is None else list(bias.shape),
            hint=_ORIGINAL,
        )


CODEC = Codec("ComfyUI's NVFP4 and MXFP8", (), _declare, unmarked)
