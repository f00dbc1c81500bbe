"""Integers of compressed-tensors: pack-quantized, int-quantized and naive-quantized.

Packed, a module has `weight_packed` I32 (out, words) with codes of 2 to 8 bits along the inputs,
`weight_shape`, `weight_scale`, and if it is asymmetric `weight_zero_point`, packed down the rows;
codes and zeros are offset by 2^(bits − 1). `weight_g_idx` says which group a column is in. Else
`weight` is I8. A value is (code − zero), rounded to the type of the scales, times the scale,
rounded again. Up to 0.17 the library put as many whole codes into a word as fit, later a dense
stream; the number of words tells which.

Source: compressed-tensors 0.20, `compressors/pack_quantized` and `quantization/lifecycle/forward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from loratools.base.codecs.codec import (
    Codec,
    CodedWeight,
    Encoded,
    Encoder,
    Scheme,
    Stored,
    blank_like,
    row_piece,
)
from loratools.base.codecs.levels import Attempt, as_they_were, integer_codes, nearer, rounded
from loratools.base.codecs.parts import matrix_rows
from loratools.base.codecs.words import Words
from loratools_formats.checkpoints.siblings import missing_part, sibling, wrong_shape
from loratools_formats.core.dtypes import OF_MODELS, Array, converted, encode
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_TOGETHER = 32  # rows whose zeros fill whole words
_PACKED = ".weight_packed"


class _Integers(CodedWeight):
    """(code − zero) · scale, rounded after each.

    Args:
        key: of the plain weight.
        shape: of it.
        codes: I8, or I32 words.
        words: how words are packed; None for I8.
        parts: scale, and zero point and g_idx where there are any.
        name: of the scheme.
    """

    def __init__(
        self,
        key: str,
        shape: tuple[int, ...],
        codes: TensorRef,
        words: Words | None,
        parts: Mapping[str, TensorRef],
        name: str,
    ) -> None:
        self._codes, self._words = codes, words
        self._scale, self._zero = parts["scale"], parts.get("zero_point")
        self._index = parts.get("g_idx")
        grid = self._scale.shape
        self._grid = (1, 1) if self._scale.numel == 1 else (grid[0], (*grid, 1)[1])
        group = shape[-1] // self._grid[1] if self._grid[1] > 1 else None
        bits = 8 if words is None else words.bits
        super().__init__(
            key, shape, self._scale.dtype, (codes, *parts.values()), Scheme(name, bits, group)
        )

    def rows(self, start: int, stop: int) -> Array:
        """Return rows, rounded to the type of the scales after the subtraction."""
        return self._meant(self._read_codes(start, stop), *self.grid(start, stop))

    def _read_codes(self, start: int, stop: int) -> Array:
        """Return codes of rows, less 2^(bits − 1): F32 (rows, width)."""
        stored = matrix_rows(self._codes, start, stop)
        if self._words is None:
            values: Array = stored.astype(np.float32)
            return values
        return self._words.read(stored, self.shape[-1])

    def grid(self, start: int, stop: int) -> tuple[Array, Array | None]:
        """Return the stored scales of rows, and their zeros in float32 if any: (rows, groups)."""
        lines = np.arange(start, stop) // (self.shape[0] // self._grid[0])
        first = int(lines[0]) if len(lines) else 0
        scales = self._read(self._scale, lines, first)
        if self._zero is None:
            return scales, None
        return scales, self._zeros(self._zero, lines, first).astype(np.float32)

    def _meant(self, values: Array, scales: Array, zeros: Array | None) -> Array:
        """Return (code − zero) · scale, the difference rounded, in place of the codes."""
        if zeros is not None:
            self._spread(values, -zeros, np.add)
            if self.dtype.bits == 16:
                values = converted(values, self.dtype.numpy_dtype()).astype(np.float32)
        return self._spread(values, scales.astype(np.float32), np.multiply)

    def encoder(self) -> Encoder:
        """Return what stores new codes, with the old scales or with new ones where that is nearer.

        Zeros stay. New scales are only for groups of one row's neighbours.
        """
        return _IntegersEncoder(self)

    @property
    def has_groups(self) -> bool:
        """Whether each scale is for neighbours in one row."""
        return self._grid[0] == self.shape[0] and self._index is None

    @property
    def scale(self) -> TensorRef:
        """The stored scales."""
        return self._scale

    def attempt(self, wanted: Array, scales: Array, zeros: Array | None) -> Attempt:
        """Return the nearest codes, from 0 on, for scales as they are to be stored."""
        rows, width = wanted.shape
        half = 1 << (self.scheme.bits - 1)
        groups = scales.shape[1]
        each, by_column = wanted.reshape(rows, groups, -1), scales.astype(np.float32)
        middle = np.zeros_like(by_column) if zeros is None else zeros
        if self._index is not None and groups > 1:
            order = self._index.load().astype(np.int64)
            each, by_column, middle = wanted[:, :, None], by_column[:, order], middle[:, order]
        codes = integer_codes(each, by_column, middle + np.float32(half), 2 * half - 1)
        values = codes.reshape(rows, width).astype(np.float32) - np.float32(half)
        values = rounded(self._meant(values, scales, zeros), self.dtype)
        return Attempt(codes, values.reshape(codes.shape), (scales,))

    def stored(self, start: int, stop: int, like: Attempt) -> Attempt:
        """Return rows as they are stored, in the shape of an attempt."""
        scales, zeros = self.grid(start, stop)
        codes = self._read_codes(start, stop)
        half = np.float32(1 << (self.scheme.bits - 1))
        from_zero = (codes + half).astype(np.uint8).reshape(like.codes.shape)
        values = rounded(self._meant(codes, scales, zeros), self.dtype)
        return Attempt(from_zero, values.reshape(like.values.shape), (scales,))

    def bytes_of(self, codes: Array) -> Array:
        """Return codes from 0 on, U8 (rows, width), as they are stored: U8 (rows, bytes)."""
        if self._words is None:
            return codes ^ np.uint8(1 << 7)
        return self._words.put(codes, self._codes.shape[-1])

    def _read(self, tensor: TensorRef, lines: Array, first: int) -> Array:
        """Return the numbers of rows of a grid: (rows, groups)."""
        across = self._grid[1]
        last = int(lines[-1]) + 1 if len(lines) else first
        stored = tensor.elements(first * across, last * across)
        numbers: Array = stored.reshape(-1, across)[lines - first]
        return numbers

    def _zeros(self, zero: TensorRef, lines: Array, first: int) -> Array:
        """Return the zeros of rows: (rows, groups); they may be packed down the rows."""
        if self._words is None or self._grid[0] == 1 or zero.dtype.code != "I32":
            return self._read(zero, lines, first)
        bits, across = self._words.bits, self._grid[1]
        dense = zero.shape[0] == Words.number(self._grid[0], bits, dense=True)
        codes, words = (_TOGETHER, bits) if dense else (32 // bits, 1)
        top, last = first // codes, int(lines[-1]) + 1
        end = min(-(-last // codes) * words, zero.shape[0])
        stored = zero.elements(top * words * across, end * across).reshape(-1, across)
        packed, begin = Words(bits, dense=dense), top * codes
        zeros: Array = packed.read(np.ascontiguousarray(stored.T), last - begin).T[lines - begin]
        return zeros

    def _spread(self, values: Array, numbers: Array, operation: np.ufunc) -> Array:
        """Combine rows in place with one number for each of their groups."""
        if self._index is not None and self._grid[1] > 1:
            order = self._index.load().astype(np.int64)
            operation(values, numbers[:, order], out=values)
            return values
        grouped = values.reshape(len(values), numbers.shape[1], -1)
        operation(grouped, numbers[:, :, None], out=grouped)
        return values


class _IntegersEncoder(Encoder):
    """New codes, and new scales where they are nearer.

    Args:
        weight: whose zeros and, where no others are nearer, scales are used.
    """

    def __init__(self, weight: _Integers) -> None:
        scales = (blank_like(weight.scale),) if weight.has_groups else ()
        super().__init__((blank_like(weight.parts[0]), *scales), weight.scheme)
        self._weight = weight
        self._half = 1 << (weight.scheme.bits - 1)

    def encode(self, start: int, values: Array) -> Encoded:
        """Return rows in the format."""
        weight = self._weight
        scales, zeros = weight.grid(start, start + len(values))
        chosen = weight.attempt(values, scales, zeros)
        wanted = values.reshape(chosen.codes.shape)
        kept = weight.stored(start, start + len(values), chosen)
        chosen = as_they_were(wanted, kept, chosen)
        if weight.has_groups:
            fresh = weight.attempt(values, self._fresh(wanted, zeros), zeros)
            chosen = nearer(wanted, chosen, fresh)
        data = weight.bytes_of(chosen.codes.reshape(values.shape))
        parts = (data, *chosen.numbers)[: len(self.blanks)]
        pieces = [row_piece(b, start, part) for b, part in zip(self.blanks, parts, strict=True)]
        return Encoded(chosen.values.reshape(values.shape), pieces)

    def _fresh(self, wanted: Array, zeros: Array | None) -> Array:
        """Return the smallest scales with which no value is beyond the last code."""
        zero = np.float32(0) if zeros is None else zeros
        above, below = self._half - 1 - zero, self._half + zero
        high, low = wanted.max(2), -wanted.min(2)
        scales = np.maximum(
            np.where(above > 0, high / np.maximum(above, 1), 0),
            np.where(below > 0, low / np.maximum(below, 1), 0),
        )
        return encode(np.maximum(scales, np.float32(0)), self._weight.dtype)


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    bits_of = _bits_stated(stored.stated)
    for module, codes in stored.named(_PACKED).items():
        if codes.dtype.code == "I32" and len(codes.shape) == 2:
            found[f"{module}.weight"] = _packed(stored, module, codes, bits_of)
    for module, codes in stored.named(".weight").items():
        scale = stored.tensors.get(f"{module}.weight_scale")
        if codes.dtype.code != "I8" or len(codes.shape) != 2 or scale is None:
            continue
        if scale.dtype.code in OF_MODELS:
            parts = _parts(stored, module, codes.shape, None)
            key = f"{module}.weight"
            found[key] = _Integers(key, codes.shape, codes, None, parts, "INT8")
    return found


def _packed(stored: Stored, module: str, codes: TensorRef, bits_of: frozenset[int]) -> CodedWeight:
    shape_of = stored.tensors.get(f"{module}.weight_shape")
    width = None
    if shape_of is not None:
        sibling(stored.tensors, shape_of.key, ("I64", "I32"), (2,))
        out, width = (int(size) for size in shape_of.load())
        if out != codes.shape[0] or width <= 0:
            raise AdapterError(
                "weight_shape does not fit the codes",
                tensor=shape_of.key,
                got=[out, width],
                expected=f"{codes.shape[0]} rows",
            )
    words, whole = _layout(codes, width, bits_of)
    shape = (codes.shape[0], whole)
    parts = _parts(stored, module, shape, words)
    if shape_of is not None:
        parts["shape"] = shape_of
    elif _stated_weights(stored.stated, "group_size") != {whole // (*parts["scale"].shape, 1)[1]}:
        raise AdapterError(
            "a packed weight may end inside of a word, and nothing says where",
            tensor=codes.key,
            expected=f"{module}.weight_shape, or groups of the size that the configuration states",
        )
    if not {"g_idx", "unused_g_idx"} & set(parts) and _is_ordered(stored.stated, parts["scale"]):
        raise missing_part(f"{module}.weight_g_idx")
    if "zero_point" not in parts and _stated_weights(stored.stated, "symmetric") == {False}:
        raise missing_part(f"{module}.weight_zero_point")
    key = f"{module}.weight"
    return _Integers(key, shape, codes, words, parts, f"INT{words.bits}")


def _layout(codes: TensorRef, width: int | None, stated: frozenset[int]) -> tuple[Words, int]:
    """Return how the words of a weight are packed, and its number of columns.

    Raises:
        AdapterError: no number of bits fits the words.
        UnsupportedError: several fit, and none is stated.
    """
    words = codes.shape[1]
    if width is None:
        if len(stated) != 1:
            raise UnsupportedError(
                "a packed weight cannot be read without weight_shape or its bits",
                tensor=codes.key,
                hint="Keep config.json with its quantization_config beside the weights",
            )
        (bits,) = stated
        return Words(bits, dense=True), words * 32 // bits
    fits = [
        (bits, dense)
        for bits in range(2, 9)
        for dense in (True, False)
        if Words.number(width, bits, dense=dense) == words and (dense or 32 % bits)
    ]
    dense_ones = [fit for fit in fits if fit[1]]
    chosen = [fit for fit in fits if fit[0] in stated] or dense_ones or fits
    if not chosen:
        raise wrong_shape(codes, f"words for {width} columns of 2 to 8 bits")
    if len({bits for bits, _ in chosen}) > 1:
        raise UnsupportedError(
            "the bits of a packed weight are not known",
            tensor=codes.key,
            got=f"{' or '.join(str(bits) for bits, _ in chosen)} fit",
            hint="Keep config.json with its quantization_config beside the weights",
        )
    bits, dense = chosen[0]
    return Words(bits, dense=dense), width


def _parts(
    stored: Stored, module: str, shape: tuple[int, ...], words: Words | None
) -> dict[str, TensorRef]:
    """Return the scale of a weight, and its zero point and order of groups if it has them."""
    scale = sibling(stored.tensors, f"{module}.weight_scale", OF_MODELS)
    grid = (1, 1) if scale.numel == 1 else (*scale.shape, 1)[:2]
    index = stored.tensors.get(f"{module}.weight_g_idx")
    if (
        len(scale.shape) > 2
        or not all(grid)
        or shape[0] % grid[0]
        or (shape[1] % grid[1] and index is None)
    ):
        raise wrong_shape(scale, f"groups that divide {list(shape)}")
    parts = {"scale": scale}
    zero = stored.tensors.get(f"{module}.weight_zero_point")
    if zero is not None:
        if zero.dtype.code not in ("I8", "I32", *OF_MODELS):
            sibling(stored.tensors, zero.key, ("I8", "I32"))
        _check_zeros(zero, grid, words)
        parts["zero_point"] = zero
    if index is not None:
        sibling(stored.tensors, index.key, ("I32", "I64"), (shape[1],))
        if index.load().min(initial=0) < 0 or index.load().max(initial=0) >= grid[1]:
            if (index.load() == -1).all():
                parts["unused_g_idx"] = index
                return parts
            raise AdapterError(
                "a column of a quantised weight is in a group that does not exist",
                tensor=index.key,
                expected=f"0 to {grid[1] - 1}",
            )
        parts["g_idx"] = index
    return parts


def _check_zeros(zero: TensorRef, grid: tuple[int, ...], words: Words | None) -> None:
    """Check that there is a zero for each scale; those of packed codes are packed, too.

    Raises:
        AdapterError: there is not.
    """
    rows, groups = grid
    fits = zero.numel == rows * groups
    if words is not None and rows > 1 and zero.dtype.code == "I32":
        counts = [Words.number(rows, words.bits, dense=dense) for dense in (True, False)]
        fits = zero.shape in [(count, groups) for count in counts]
    if not fits:
        raise wrong_shape(zero, f"zeros of {rows} × {groups} groups")


def _is_ordered(stated: Mapping[str, Any], scale: TensorRef) -> bool:
    """Return whether columns are in groups that only an order of them tells."""
    return _stated_weights(stated, "actorder") == {"group"} and (*scale.shape, 1)[1] > 1


def _bits_stated(stated: Mapping[str, Any]) -> frozenset[int]:
    """Return the bits that a configuration states for weights."""
    return frozenset(bits for bits in _stated_weights(stated, "num_bits") if type(bits) is int)


def _stated_weights(stated: Mapping[str, Any], entry: str) -> set[Any]:
    """Return what a configuration states for weights under a name, in all its groups."""
    groups = stated.get("config_groups")
    each = groups.values() if isinstance(groups, Mapping) else ()
    weights = [group.get("weights") for group in each if isinstance(group, Mapping)]
    found = [one.get(entry) for one in weights if isinstance(one, Mapping)]
    return {value for value in found if isinstance(value, bool | int | str | None)}


CODEC = Codec("integers of compressed-tensors", ("compressed-tensors",), _declare)
