"""Codes of a few bits, packed: out of bytes into numbers, and back into bytes.

Code i of a row has bits [i·b, i·b + b) of its bytes, the lowest bit of the first byte first. GPTQ,
compressed-tensors and MLX store this stream in 32-bit words, and codes may straddle them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from loratools_formats.core.dtypes import DTYPES, Array, DType, converted

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What four bits of OCP's E2M1 mean, by code."""

QUARTERS = np.concatenate([np.arange(8), -np.arange(8.0)]).astype(np.float32) / 4
"""What a sign and three bits of quarters mean, by code."""


def unpacked(data: Array, bits: int, count: int, kind: DTypeLike = np.uint8) -> Array:
    """Return the codes of rows of bytes.

    Args:
        data: U8 (rows, bytes), at least ceil(count · bits / 8) bytes a row.
        bits: of a code, 1 to 8.
        count: codes of a row.
        kind: of integers to return, NumPy's U8 or U16.

    Returns:
        (rows, count).
    """
    if bits in (2, 4):
        needed = -(-count * bits // 8)
        pieces = looked_up(_pieces(bits, np.dtype(kind).itemsize), data[:, :needed])
        return pieces.view(kind).reshape(len(data), -1)[:, :count]
    codes: Array = _straddling(data, bits, count).astype(kind, copy=False)
    return codes


def _straddling(data: Array, bits: int, count: int) -> Array:
    """Return codes, of which a byte need not hold a whole number: U8 (rows, count)."""
    if bits == 8:
        return data[:, :count]
    eights = -(-count // 8)
    if data.shape[1] < eights * bits:
        data = np.pad(data, ((0, 0), (0, eights * bits - data.shape[1])))
    sets = np.ascontiguousarray(data[:, : eights * bits]).reshape(-1, bits)
    out = np.empty((len(sets), 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = sets[:, byte] >> shift
        if shift + bits > 8:
            value = value | (sets[:, byte + 1] << (8 - shift))
        out[:, i] = value & ((1 << bits) - 1)
    return out.reshape(len(data), -1)[:, :count]


def packed(codes: Array, bits: int) -> Array:
    """Return rows of codes as bytes, the inverse of `unpacked`.

    Args:
        codes: U8 (rows, count), each below 2^bits.
        bits: of a code, 1 to 8.

    Returns:
        U8 (rows, ceil(count · bits / 8)); bits beyond the last code are zero.
    """
    if bits == 8:
        return np.ascontiguousarray(codes)
    rows, count = codes.shape
    needed = -(-count * bits // 8)
    whole = -(-count // 8) * 8
    if whole > count:
        codes = np.pad(codes, ((0, 0), (0, whole - count)))
    if 8 % bits == 0:
        each = 8 // bits
        sets = codes.reshape(rows, -1, each)
        out = sets[:, :, 0].copy()
        for i in range(1, each):
            out |= sets[:, :, i] << np.uint8(bits * i)
        return np.ascontiguousarray(out[:, :needed])
    eights = codes.reshape(rows, -1, 8)
    data = np.zeros((rows, eights.shape[1], bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        data[:, :, byte] |= eights[:, :, i] << np.uint8(shift)
        if shift + bits > 8:
            data[:, :, byte + 1] |= eights[:, :, i] >> np.uint8(8 - shift)
    return np.ascontiguousarray(data.reshape(rows, -1)[:, :needed])


@cache
def _pieces(bits: int, width: int) -> Array:
    """Return the codes of each byte, side by side in one number, `width` bytes for each."""
    byte = np.arange(256)[:, None]
    codes = (byte >> (np.arange(8 // bits) * bits) & ((1 << bits) - 1)).astype(f"u{width}")
    return codes.view(f"u{width * 8 // bits}").reshape(-1)


def looked_up(table: Array, codes: Array) -> Array:
    """Return what codes mean, of the shape of the codes.

    Args:
        table: as many numbers as there may be codes.
        codes: unsigned integers.
    """
    out = np.empty(codes.shape, table.dtype)
    # No code is beyond the table; that mode spares a copy, which takes longer than the rest.
    np.take(table, codes, out=out, mode="clip")
    return out


def fours(data: Array, table: Array) -> Array:
    """Return what four-bit codes mean, the low half of a byte first.

    Args:
        data: U8 (rows, bytes).
        table: F32 (16,) what each code means.

    Returns:
        F32 (rows, 2 · bytes).
    """
    values: Array = looked_up(_halves(table.tobytes()), data).view(np.float32)
    return values


@cache
def _halves(table: bytes) -> Array:
    """Return what the halves of each byte mean, side by side: U64 (256,)."""
    values, byte = np.frombuffer(table, np.float32), np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1).view(np.uint64).reshape(-1)


def eights(codes: Array, table: Array) -> Array:
    """Return what codes of a byte each mean, of the shape of the codes: F32.

    Two are looked up at a time, which takes not much longer than one.

    Args:
        codes: U8, of any shape.
        table: F32 (up to 256,) what each code means.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    even = len(flat) // 2 * 2
    out = np.empty(len(flat), np.float32)
    pairs = out[:even].view(np.uint64)
    np.take(_twos(table.tobytes()), flat[:even].view(np.uint16), out=pairs, mode="clip")
    if even < len(flat):
        out[-1] = table[flat[-1]]
    return out.reshape(codes.shape)


@cache
def _twos(table: bytes) -> Array:
    """Return what two bytes mean, one behind the other, by the number that they are."""
    values = np.frombuffer(table, np.float32)
    last = np.array([len(values) - 1] * 2, np.uint8).view(np.uint16)[0]
    both = np.arange(int(last) + 1, dtype=np.uint16).view(np.uint8)
    means = values[np.minimum(both, len(values) - 1)]
    return means.view(np.uint64)


def numbers(data: Array, bits: int, count: int, offset: int = 0) -> Array:
    """Return codes as `unpacked` does, less an offset, in float32: F32 (rows, count)."""
    if bits == 4:
        return fours(data[:, : -(-count // 2)], _sixteen(offset))[:, :count]
    values: Array = unpacked(data, bits, count).astype(np.float32)
    if offset:
        values -= np.float32(offset)
    return values


@cache
def _sixteen(offset: int) -> Array:
    return np.arange(16, dtype=np.float32) - np.float32(offset)


def small_floats(codes: Array, kind: str) -> Array:
    """Return what bytes mean as eight-bit floats of a type, in float32.

    Args:
        codes: U8, of any shape.
        kind: F8_E4M3 or F8_E5M2.
    """
    return eights(codes, _small_floats(kind))


@cache
def _small_floats(kind: str) -> Array:
    table: Array = np.arange(256, dtype=np.uint8).view(DTYPES[kind].numpy_dtype())
    return table.astype(np.float32)


def powers(codes: Array) -> Array:
    """Return E8M0: 2^(code − 127) in float32, NaN for 255, as OCP's standard has it."""
    return looked_up(_powers(), codes)


@cache
def _powers() -> Array:
    return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


def times_groups(values: Array, scales: Array) -> Array:
    """Multiply rows in place with one scale for each of the groups along them, and return them.

    Args:
        values: F32 (rows, groups · size), contiguous.
        scales: F32 (rows or 1, groups).
    """
    grouped = values.reshape(len(values), scales.shape[1], -1)
    grouped *= scales[:, :, None]
    return values


def are_few(levels: int, size: int) -> bool:
    """Return whether codes of a group are better looked up than computed with.

    Args:
        levels: how many codes there may be.
        size: values of a group.
    """
    return 4 * levels <= size


def by_group(codes: Array, table: Array, order: Array | None = None) -> Array:
    """Return what codes mean in their groups: (rows, width) of the table's type.

    Args:
        codes: U16 (rows, width), changed in place.
        table: (rows, groups, levels), what each code means there.
        order: the group of each column; None for neighbours.
    """
    rows, groups, levels = table.shape
    places = codes if table.size <= 1 << 16 else codes.astype(np.uint32)
    first = (np.arange(rows * groups) * levels).astype(places.dtype).reshape(rows, groups)
    if order is None:
        grouped = places.reshape(rows, groups, -1)
        grouped += first[:, :, None]
    else:
        places += first[:, order]
    return looked_up(table.reshape(-1), places)


def above_zeros(
    codes: Array,
    bits: int,
    scales: Array,
    zeros: Array,
    dtype: DType,
    order: Array | None = None,
) -> Array:
    """Return scale · (code − zero), in float32 or rounded to a type: (rows, width).

    Args:
        codes: U16 (rows, width), changed in place.
        bits: of a code.
        scales: F32 (rows, groups).
        zeros: F32 (rows, groups).
        dtype: type of the values.
        order: the group of each column; None for neighbours.
    """
    rows, groups = scales.shape
    # Rounding to BF16 is as fast as looking up.
    if dtype.code == "F16" and are_few(1 << bits, codes.shape[1] // groups):
        meant = np.arange(1 << bits, dtype=np.float32) - zeros[:, :, None]
        meant *= scales[:, :, None]
        return by_group(codes, converted(meant, dtype.numpy_dtype()), order)
    values = codes.astype(np.float32)
    if order is None:
        grouped = values.reshape(rows, groups, -1)
        grouped -= zeros[:, :, None]
        return times_groups(values, scales)
    values -= zeros[:, order]
    values *= scales[:, order]
    return values
