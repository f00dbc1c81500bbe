"""New values of MLX's quantised weights: codes and scales, with old scales or with MLX's own.

Scales and biases are those of `mlx.core.quantize` of mlx 0.32, computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from loratools.base.codecs.bits import E2M1, packed, powers, small_floats, times_groups
from loratools.base.codecs.codec import Encoded, Encoder, Scheme, blank_like, row_piece
from loratools.base.codecs.levels import (
    Attempt,
    as_they_were,
    float_codes,
    integer_codes,
    nearer,
    rounded,
)
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.shard_plan import Blank
from loratools_formats.core.dtypes import DTYPES, Array, DType, converted, encode
from loratools_formats.core.tensors import TensorRef

EIGHT = 8
_E4M3 = "F8_E4M3"
_LEAST_SCALE = np.float32(1e-7)


class Mode(NamedTuple):
    """A mode without biases: bits of a code, group, and whether scales are powers of two."""

    bits: int
    group: int
    powers: bool

    @property
    def kind(self) -> str:
        """Name of the type of a code."""
        return _E4M3 if self.bits == EIGHT else "F4_E2M1"

    def scales(self, stored: Array) -> Array:
        """Return what bytes mean as scales: F32."""
        return powers(stored) if self.powers else small_floats(stored, _E4M3)

    def fresh(self, largest: Array) -> Array:
        """Return the scales that MLX computes for groups, by their largest magnitude: U8."""
        ratio = largest / np.float32(448 if self.bits == EIGHT else 6)
        if not self.powers:
            return float_codes(ratio, _E4M3)
        _, exponent = np.frexp(ratio)
        exact = np.ldexp(np.float32(0.5), exponent) == ratio
        codes = np.where(ratio > 0, exponent - exact, 0) + 127
        stored: Array = np.clip(codes, 0, 254).astype(np.uint8)
        return stored


MODES = {
    "mxfp4": Mode(4, 32, powers=True),
    "mxfp8": Mode(8, 32, powers=True),
    "nvfp4": Mode(4, 16, powers=False),
}


def affine(values: Array, scales: Array, biases: Array, dtype: DType) -> Array:
    """Return scale · code + bias, the product rounded: F32 (rows, width), made in place."""
    times_groups(values, scales.astype(np.float32))
    if dtype.bits == 16:
        values = converted(values, dtype.numpy_dtype()).astype(np.float32)
    grouped = values.reshape(len(values), biases.shape[1], -1)
    grouped += biases.astype(np.float32)[:, :, None]
    return values


class AffineEncoder(Encoder):
    """Codes, scales and biases as `mlx.core.quantize` computes them, or with old scales.

    Args:
        key: of the codes.
        shape: of the plain weight.
        dtype: type of the scales.
        bits: of a code.
        group: values that share a scale.
        names: of scales and biases; beside the codes by default.
        old: returns rows as they are stored, whose scales are used again where they are no worse;
            None for new scales only.
    """

    def __init__(
        self,
        key: str,
        shape: tuple[int, ...],
        dtype: DType,
        bits: int,
        group: int,
        *,
        names: tuple[str, str] | None = None,
        old: Callable[[int, int], Attempt] | None = None,
    ) -> None:
        *stack, width = shape
        module = key.removesuffix(".weight")
        scales, biases = names or (f"{module}.scales", f"{module}.biases")
        grid = (*stack, width // group)
        super().__init__(
            (
                Blank(key, DTYPES["U32"], (*stack, width * bits // 32)),
                Blank(scales, dtype, grid),
                Blank(biases, dtype, grid),
            ),
            Scheme("MLX affine", bits, group),
        )
        self._dtype, self._old = dtype, old
        self._top = (1 << bits) - 1

    def encode(self, start: int, values: Array) -> Encoded:
        """Return rows with the old scales, or new ones in the groups where they are nearer."""
        rows, width = values.shape
        wanted = values.reshape(rows, width // (self.scheme.group or width), -1)
        chosen = self._with(wanted, *self._fresh(wanted))
        if self._old is not None:
            kept = self._old(start, start + rows)
            reused = as_they_were(wanted, kept, self._with(wanted, *kept.numbers))
            chosen = nearer(wanted, reused, chosen)
        data = packed(chosen.codes.reshape(rows, width), self.scheme.bits)
        pieces = zip(self.blanks, (data, *chosen.numbers), strict=True)
        stored = [row_piece(blank, start, part) for blank, part in pieces]
        return Encoded(chosen.values.reshape(rows, width), stored)

    def _with(self, wanted: Array, scales: Array, biases: Array) -> Attempt:
        """Return the nearest codes for given scales."""
        shape = wanted.shape
        moved = wanted - biases.astype(np.float32)[:, :, None]
        codes = integer_codes(moved, scales.astype(np.float32), 0.0, self._top)
        values = codes.reshape(len(wanted), -1).astype(np.float32)
        values = rounded(affine(values, scales, biases, self._dtype), self._dtype)
        return Attempt(codes, values.reshape(shape), (scales, biases))

    def _fresh(self, wanted: Array) -> tuple[Array, Array]:
        """Return the scales and biases that MLX computes for values."""
        low, high = wanted.min(2), wanted.max(2)
        is_low = np.abs(low) > np.abs(high)
        step = np.maximum((high - low) / np.float32(self._top), _LEAST_SCALE)
        step = np.where(is_low, step, -step)
        edge = np.where(is_low, low, high)
        first = np.rint(edge / step)
        is_off = first != 0
        scales = np.where(is_off, edge / np.where(is_off, first, 1), step)
        biases = np.where(is_off, edge, np.float32(0))
        return encode(scales, self._dtype), encode(biases, self._dtype)


class FloatingEncoder(Encoder):
    """Codes and scales of a mode without biases."""

    def __init__(self, codes: TensorRef, scales: TensorRef, mode: Mode, scheme: Scheme) -> None:
        super().__init__((blank_like(codes), blank_like(scales)), scheme)
        self._scales, self._mode = scales, mode

    def encode(self, start: int, values: Array) -> Encoded:
        """Return rows with the old scales, or new ones in the groups where they are nearer."""
        rows, width = values.shape
        wanted = values.reshape(rows, -1, self._mode.group)
        old = matrix_rows(self._scales, start, start + rows)
        fresh = self._mode.fresh(np.abs(wanted).max(2))
        chosen = nearer(wanted, self._with(wanted, old), self._with(wanted, fresh))
        data = packed(chosen.codes.reshape(rows, width), self._mode.bits)
        pieces = zip(self.blanks, (data, *chosen.numbers), strict=True)
        stored = [row_piece(blank, start, part) for blank, part in pieces]
        return Encoded(chosen.values.reshape(rows, width), stored)

    def _with(self, wanted: Array, stored: Array) -> Attempt:
        """Return the nearest codes for scales as they are stored."""
        scales = self._mode.scales(stored)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = float_codes(wanted / scales[:, :, None], self._mode.kind)
        values = E2M1[codes] if self._mode.bits != EIGHT else small_floats(codes, _E4M3)
        times_groups(values.reshape(len(values), -1), scales)
        return Attempt(codes, rounded(values, DTYPES["BF16"]), (stored,))
