"""NVFP4 and MXFP8 as ComfyUI stores them, and which of its other formats can be read.

A layer's description names its format. In `nvfp4`, `weight` U8 (out, in / 2) holds E2M1 codes, the
first of two in the high half; `weight_scale` E4M3 has one for each 16 inputs, `weight_scale_2` is a
number over all, and both multiply. In `mxfp8`, `weight` is F8_E4M3 and `weight_scale` E8M0, one for
each 32 inputs. The scales of both are in the order of cuBLAS: tiles of 128 rows and 4 columns, row
r and column c of a tile at 16 · (r mod 32) + 4 · (r div 32) + c, tiles of one band of rows one
behind the other, padded with zeros. Weights are padded with zeros, too, to 16 or 32 rows and
columns; the description, or the bias, tells their own shape. Eight-bit floats and integers with a
scale are left to the codecs that read them from others. `convrot` has what is stored rotated.

Source: comfy-kitchen 0.2.40 (`tensor/nvfp4.py`, `tensor/mxfp8.py`, `float_utils.py`), ComfyUI
`comfy/ops.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

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
from loratools.base.codecs.convrot import rotated_weight
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
_READ = (
    "nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip
_ROTATED = ("int8_tensorwise", "convrot_w4a4")
_ORIGINAL = "Start from the original checkpoint"


class _Form(NamedTuple):
    """What a stored byte holds, and to how many rows and columns weights are padded."""

    each: int
    unit: int


_FORMS = {"nvfp4": _Form(2, 16), "mxfp8": _Form(1, 32)}


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
    _each: int

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32, to be rounded to BF16."""
        values = self._values(matrix_rows(self._codes, start, stop))
        return times_groups(values, self._grid(start, stop))[:, : self.shape[-1]]

    @abstractmethod
    def _values(self, codes: Array) -> Array:
        """Return what stored rows mean without their scales: F32 (rows, stored columns)."""

    @abstractmethod
    def _grid(self, start: int, stop: int) -> Array:
        """Return the scales of rows: F32 (rows, groups)."""

    @abstractmethod
    def _nearest(self, values: Array, scales: Array) -> tuple[Array, Array]:
        """Return rows as bytes, and what they mean: U8 (rows, bytes) and F32 (rows, width)."""

    def encoder(self) -> Encoder | None:
        """Return what stores new codes with the old scales; None if the weight is padded."""
        if self.shape != (self._codes.shape[0], self._codes.shape[1] * self._each):
            return None
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

    _each = 2

    def __init__(
        self, codes: TensorRef, shape: tuple[int, int], scales: TensorRef, of_all: TensorRef
    ) -> None:
        out, half = codes.shape
        self._codes, self._of_all = codes, of_all
        self._tiles = _Tiles(scales, out, half // 8)
        scheme = Scheme("NVFP4 of ComfyUI", 4, 16)
        super().__init__(codes.key, shape, DTYPES["BF16"], (codes, scales, of_all), scheme)

    def _values(self, codes: Array) -> Array:
        return fours(_turned(codes), E2M1)

    def _grid(self, start: int, stop: int) -> Array:
        number = self._of_all.load(np.float32).reshape(-1)
        scales: Array = small_floats(self._tiles.read(start, stop), _E4M3) * number
        return scales

    def _nearest(self, values: Array, scales: Array) -> tuple[Array, Array]:
        codes = float_codes(values, "F4_E2M1")
        return _turned(packed(codes, 4)), times_groups(E2M1[codes], scales)


class _Mxfp8(_Tiled):
    """E4M3 · scale."""

    _each = 1

    def __init__(self, codes: TensorRef, shape: tuple[int, int], scales: TensorRef) -> None:
        out, width = codes.shape
        self._codes, self._tiles = codes, _Tiles(scales, out, width // 32)
        scheme = Scheme("MXFP8 of ComfyUI", 8, 32)
        super().__init__(codes.key, shape, DTYPES["BF16"], (codes, scales), scheme)

    def _values(self, codes: Array) -> Array:
        return small_floats(codes.view(np.uint8), _E4M3)

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
        form, inner = str(said.get("format")), said.get("params")
        of_layer = {**said, **(inner if isinstance(inner, Mapping) else {})}
        if form in _ROTATED and (of_layer.get("convrot") or form not in _BY_OTHERS):
            found[codes.key] = rotated_weight(stored.tensors, codes, form, of_layer)
            continue
        if of_layer.get("convrot"):
            form = f"{form}, rotated (convrot)"
        elif form.startswith(_BY_OTHERS):
            continue
        if form not in _READ:
            raise UnsupportedError(
                "this format of ComfyUI cannot be read",
                tensor=codes.key,
                got=form,
                expected=", ".join(_READ),
                hint=_ORIGINAL,
            )
        found[codes.key] = _weight(stored, module, codes, form, of_layer)
    return found


def _weight(
    stored: Stored, module: str, codes: TensorRef, form: str, said: Mapping[str, Any]
) -> CodedWeight:
    kinds, group = (("U8",), 8) if form == "nvfp4" else ((_E4M3,), 32)
    sibling(stored.tensors, codes.key, kinds)
    if len(codes.shape) != 2 or not all(codes.shape) or codes.shape[1] % group:
        raise wrong_shape(codes, f"(out, a multiple of {group})")
    scale = f"{module}.weight_scale"
    shape = _own_shape(codes, stored.tensors.get(f"{module}.bias"), said, _FORMS[form])
    if form != "nvfp4":
        return _Mxfp8(codes, shape, sibling(stored.tensors, scale, _EXPONENTS))
    scales = sibling(stored.tensors, scale, (_E4M3, "U8"))
    of_all = sibling(stored.tensors, f"{module}.weight_scale_2", ("F32",))
    if of_all.numel != 1:
        raise wrong_shape(of_all, "one number")
    return _Nvfp4(codes, shape, scales, of_all)


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


def _own_shape(
    codes: TensorRef, bias: TensorRef | None, said: Mapping[str, Any], form: _Form
) -> tuple[int, int]:
    """Return the shape of a weight that may be stored with more rows and columns, of zeros.

    Its description tells, else its bias tells the rows. Where neither does, the last stored codes
    are looked at: padding is zeros, less than a unit of them.

    Raises:
        AdapterError: they describe a shape that is not stored in this way, or the shape is not
        known.
    """
    out, width = codes.shape[0], codes.shape[1] * form.each
    stated = said.get("orig_shape")
    rows = bias.shape if bias is not None else None
    if stated is not None:
        fits = isinstance(stated, list) and len(stated) == 2 and rows in (None, (stated[0],))
        if not fits or not all(
            type(own) is int and size - form.unit < own <= size
            for own, size in zip(stated, (out, width), strict=True)
        ):
            raise _not_own_shape(codes, (out, width), stated if rows is None else list(rows))
        return stated[0], stated[1]
    if rows is not None and (len(rows) != 1 or not out - form.unit < rows[0] <= out):
        raise _not_own_shape(codes, (out, width), list(rows))
    down = out if rows is None else rows[0]
    tail = matrix_rows(codes, max(down - form.unit, 0), down).view(np.uint8)
    is_zero = (tail & 0x77 if form.each > 1 else tail & 0x7F) == 0
    first_of_byte = tail & 0x07 if form.each > 1 else tail
    ends = first_of_byte[:, -1] == 0
    may_be_padded = (rows is None and is_zero[-1].all()) or ends.all()
    if may_be_padded and not is_zero.all():
        raise AdapterError(
            "a weight that ComfyUI may have padded cannot be read, since its last codes are zeros "
            "and nothing tells its own shape",
            tensor=codes.key,
            got=[out, width],
            expected="orig_shape in its description",
            hint=_ORIGINAL,
        )
    return down, width


def _not_own_shape(codes: TensorRef, stored: tuple[int, int], told: object) -> AdapterError:
    return AdapterError(
        "a weight of ComfyUI is not stored in the shape that its description or its bias tells",
        tensor=codes.key,
        got=list(stored),
        expected=told,
        hint=_ORIGINAL,
    )


CODEC = Codec("ComfyUI's NVFP4, MXFP8 and ConvRot", (), _declare, unmarked)
