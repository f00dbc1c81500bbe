"""Codes of a few bits, packed: out of bytes into numbers, and back into bytes.

Code i of a row has bits [i·b, i·b + b) of its bytes, the lowest bit of the first byte first. GPTQ,
compressed-tensors and MLX store this stream in 32-bit words, and codes may straddle them.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from loratools_formats.core.dtypes import Array

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What four bits of OCP's E2M1 mean, by code."""


def unpacked(data: Array, bits: int, count: int) -> Array:
    """Return the codes of rows of bytes.

    Args:
        data: U8 (rows, bytes), at least ceil(count · bits / 8) bytes a row.
        bits: of a code, 1 to 8.
        count: codes of a row.

    Returns:
        U8 (rows, count).
    """
    if bits == 8:
        return data[:, :count]
    if 8 % bits == 0:
        return _in_bytes(data, bits, count)
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


def _in_bytes(data: Array, bits: int, count: int) -> Array:
    """Return codes of which a byte holds a whole number."""
    needed = -(-count * bits // 8)
    pieces = looked_up(_pieces(bits), data[:, :needed]).view(np.uint8)
    return pieces.reshape(len(data), -1)[:, :count]


@cache
def _pieces(bits: int) -> Array:
    """Return the codes of each byte, side by side in one number: (256,) of 8 / bits bytes."""
    byte = np.arange(256)[:, None]
    codes = (byte >> (np.arange(8 // bits) * bits) & ((1 << bits) - 1)).astype(np.uint8)
    return codes.view(f"u{8 // bits}").reshape(-1)


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
    codes = np.arange(256)
    pairs = np.stack([table[codes & 15], table[codes >> 4]], axis=1).view(np.uint64).reshape(-1)
    values: Array = looked_up(pairs, data).view(np.float32)
    return values


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
