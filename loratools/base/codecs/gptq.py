"""GPTQ, as auto-gptq and gptqmodel store it, and AutoRound in that form.

A module has `qweight` I32 (in · bits / 32, out), a stream of codes down each column; `qzeros` I32
(groups, out · bits / 32), a stream along each row; `scales` (groups, out); and, where columns are
not grouped in order, `g_idx` I32 (in,). A value is scale · (code − zero), rounded to the type of
the scales. In the first version of the format zeros are stored less one, in `gptq_v2` as they are.

Sources: gptqmodel 7.7 (`TorchLinear`, `convert_gptq_v1_to_v2_format`), auto-round 0.16 (`export`).
"""

from __future__ import annotations

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
    stripes,
)
from loratools.base.codecs.levels import integer_codes, rounded
from loratools.base.codecs.parts import Columns
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import OF_MODELS, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_BITS = (2, 3, 4, 8)
_BITS_OF_AUTO_ROUND = tuple(range(2, 9))  # gptqmodel stores its 5 to 7 bits in planes
_PLAIN_ZEROS = ("gptq_v2", "auto_round", "auto_round:gptqmodel")
_ZEROS_LESS_ONE = (None, "gptq", "auto", "auto_round:auto_gptq", "auto_round:gptq")
_TOGETHER = 32  # columns whose codes fill whole words


class _Gptq(CodedWeight):
    """scale · (code − zero), stored as (in, out)."""

    caveat_written = (
        "GPTQ and AutoRound choose codes by data, so that later ones make up for the errors of "
        "earlier ones; that cannot be repeated without data: changed weights have the nearest codes"
    )

    def __init__(
        self, key: str, parts: Mapping[str, TensorRef], bits: int, *, first_version: bool
    ) -> None:
        codes, zeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        height = codes.shape[0] * 32 // bits
        self._bits, self._offset = bits, int(first_version)
        self._codes = Columns(codes, codes.shape[0], codes.shape[1] * 4)
        self._zeros = Columns(zeros, zeros.shape[0], zeros.shape[1] * 4)
        self._scales = Columns(scales, scales.shape[0], scales.shape[1] * scales.dtype.bits // 8)
        self._groups = scales.shape[0]
        self._index = parts.get("g_idx")
        super().__init__(
            key,
            (codes.shape[1], height),
            scales.dtype,
            parts.values(),
            Scheme("GPTQ", bits, height // self._groups),
        )
        self._order: Array | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32 or in the type of the scales, to which they are rounded."""
        words = np.ascontiguousarray(self._codes.read(start * 4, stop * 4)).view(np.uint32)
        data = np.ascontiguousarray(words.T).view(np.uint8)
        codes = unpacked(data, self._bits, self.shape[1], np.uint16)
        return self._meant(codes, *self._grid(start, stop))

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales, zeros and order.

        GPTQ's own codes make up for the errors of those before them, which needs data.
        """
        return CodesOnly(self.parts[0], self.scheme, self._encoded, _TOGETHER)

    def _encoded(self, start: int, values: Array) -> Encoded:
        scales, zeros = self._grid(start, start + len(values))
        order, top = self._columns(), (1 << self._bits) - 1
        if order is None:
            grouped = values.reshape(len(values), self._groups, -1)
            codes = integer_codes(grouped, scales, zeros, top)
        else:
            each = values[:, :, None]
            codes = integer_codes(each, scales[:, order], zeros[:, order], top)
        codes = codes.reshape(values.shape)
        words = packed(codes, self._bits).view(np.uint32)
        data = np.ascontiguousarray(words.T).view(np.uint8)
        meant = rounded(self._meant(codes.astype(np.uint16), scales, zeros), self.dtype)
        return Encoded(meant, stripes(self.parts[0], self.shape[0] * 4, start * 4, data))

    def _grid(self, start: int, stop: int) -> tuple[Array, Array]:
        """Return the scales and zeros of outputs: F32 (outputs, groups)."""
        itemsize = self.dtype.bits // 8
        stored = np.ascontiguousarray(self._scales.read(start * itemsize, stop * itemsize))
        scales = stored.view(self.dtype.numpy_dtype()).astype(np.float32).T
        zeros = self._zeros_of(start, stop).astype(np.float32)
        return np.ascontiguousarray(scales), zeros

    def _meant(self, codes: Array, scales: Array, zeros: Array) -> Array:
        """Return scale · (code − zero) of U16 codes, which change."""
        return above_zeros(codes, self._bits, scales, zeros, self.dtype, self._columns())

    def _zeros_of(self, start: int, stop: int) -> Array:
        """Return the zeros of outputs: (outputs, groups)."""
        first = start // _TOGETHER * _TOGETHER
        last = min(-(-stop // _TOGETHER) * _TOGETHER, self.shape[0])
        data = self._zeros.read(first * self._bits // 8, -(-last * self._bits // 8))
        stored = unpacked(np.ascontiguousarray(data), self._bits, last - first)
        zeros = stored[:, start - first : stop - first] + np.uint8(self._offset)
        return (zeros & np.uint8((1 << self._bits) - 1)).T

    def _columns(self) -> Array | None:
        """Return the group of each column; None if they are in order.

        Raises:
            AdapterError: a column is in no group.
        """
        if self._index is None:
            return None
        if self._order is None:
            order = self._index.load().astype(np.int64)
            if order.min(initial=0) < 0 or order.max(initial=0) >= self._groups:
                raise AdapterError(
                    "a column of a quantised weight is in a group that does not exist",
                    tensor=self._index.key,
                    got=[int(order.min()), int(order.max())],
                    expected=f"0 to {self._groups - 1}",
                )
            if self._groups > 1 and not order.any():
                # Some loaders take that for columns in order, others for what it says.
                raise AdapterError(
                    "all columns of a quantised weight are in the first of several groups",
                    tensor=self._index.key,
                    expected=f"0 to {self._groups - 1}",
                    hint="If the model was quantised without desc_act, take g_idx out of its files",
                )
            self._order = order
        width = self.shape[1]
        if width % self._groups == 0 and np.array_equal(
            self._order, np.arange(width) // (width // self._groups)
        ):
            self._index = None
            return None
        return self._order


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for module, codes in stored.named(".qweight").items():
        names = {leaf: f"{module}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx")}
        parts = {leaf: stored.tensors[n] for leaf, n in names.items() if n in stored.tensors}
        scales = parts.get("scales")
        if codes.dtype.code != "I32" or len(codes.shape) != 2 or scales is None:
            continue
        if scales.shape[-1:] != codes.shape[-1:] or len(scales.shape) != 2:
            continue  # AWQ's gemm, whose words run along the outputs
        if scales.shape[0] == codes.shape[0]:
            continue  # AWQ's gemv, both of which have a row for each output
        found[f"{module}.weight"] = _weight(stored, module, parts)
    return found


def _weight(stored: Stored, module: str, parts: Mapping[str, TensorRef]) -> CodedWeight:
    codes, scales = parts["qweight"], parts["scales"]
    sibling(stored.tensors, scales.key, OF_MODELS)
    zeros = sibling(stored.tensors, f"{module}.qzeros", ("I32",))
    out, groups = codes.shape[1], scales.shape[0]
    if len(zeros.shape) != 2 or zeros.shape[0] != groups or not out:
        raise wrong_shape(zeros, f"{groups} rows")
    index = parts.get("g_idx")
    bits = _bits(codes, zeros, index, stored.stated)
    width = codes.shape[0] * 32 // bits
    if index is not None:
        sibling(stored.tensors, index.key, ("I32", "I64"), (width,))
    elif not groups or width % groups or _is_ragged(stored.stated, width, groups):
        raise wrong_shape(scales, f"groups that divide {width} columns, or g_idx")
    if index is None and groups > 1 and stored.stated.get("desc_act") is True:
        raise AdapterError(
            "columns of a quantised weight are out of order, and nothing says in which",
            tensor=codes.key,
            got="desc_act in the configuration",
            expected=f"{module}.g_idx",
        )
    first = (
        _is_first_version(stored.stated, codes.key)
        if stored.stated
        else _is_first_by_zeros(zeros, bits, out)
    )
    return _Gptq(f"{module}.weight", parts, bits, first_version=first)


def _bits(
    codes: TensorRef, zeros: TensorRef, index: TensorRef | None, stated: Mapping[str, Any]
) -> int:
    """Return the bits of a code. Layers of a few outputs have zeros of one word whatever they are.

    Raises:
        UnsupportedError: no number of bits fits, or several do and none of them is stated.
    """
    rows, out = codes.shape
    known = _BITS_OF_AUTO_ROUND if stated.get("quant_method") == "auto-round" else _BITS
    fits = [
        bits
        for bits in known
        if -(-out * bits // 32) == zeros.shape[1]
        and not rows % bits
        and (index is None or index.numel == rows * 32 // bits)
    ]
    chosen = [bits for bits in fits if bits == stated.get("bits")] or fits
    if len(chosen) != 1:
        raise UnsupportedError(
            "the number of bits of a GPTQ weight is not known",
            tensor=codes.key,
            got=f"qzeros {list(zeros.shape)}, qweight {list(codes.shape)}",
            expected=f"{', '.join(map(str, known))} bits",
            hint="Keep config.json with its quantization_config beside the weights",
        )
    return chosen[0]


def _is_ragged(stated: Mapping[str, Any], width: int, groups: int) -> bool:
    """Return whether groups of the stated size would leave a last one that is smaller."""
    size = stated.get("group_size")
    return (
        isinstance(size, int)
        and 0 < size < width
        and width % size > 0
        and (-(-width // size) == groups)
    )


def _is_first_by_zeros(zeros: TensorRef, bits: int, out: int) -> bool:
    """Return whether zeros are stored less one, where no configuration says so.

    Those of symmetric weights are all the middle code, or one less.

    Raises:
        UnsupportedError: the weight is not symmetric.
    """
    data = zeros.load().view(np.uint8).reshape(zeros.shape[0], -1)
    found, middle = np.unique(unpacked(data, bits, out)).tolist(), 1 << (bits - 1)
    if found not in ([middle - 1], [middle]):
        raise UnsupportedError(
            "nothing says whether the zeros of a weight of GPTQ are stored less one",
            tensor=zeros.key,
            expected="a config.json or quantize_config.json beside the weights, with quant_method",
            hint="Name the folder of the model, with its configuration, instead of a file in it",
        )
    return bool(found == [middle - 1])


def _is_first_version(stated: Mapping[str, Any], key: str) -> bool:
    """Return whether zeros are stored less one.

    Raises:
        UnsupportedError: the configuration names a form that is not known.
    """
    form = stated.get("packing_format") or stated.get("checkpoint_format")
    if form in _ZEROS_LESS_ONE:
        return True
    if form in _PLAIN_ZEROS:
        return False
    raise UnsupportedError(
        "this form of GPTQ is not known",
        tensor=key,
        got=form,
        expected="checkpoint_format gptq or gptq_v2, or packing_format of AutoRound in GPTQ's form",
        hint="Save the model in the format gptq, or start from the original checkpoint",
    )


CODEC = Codec("GPTQ", ("gptq", "auto-round"), _declare)
