"""MXFP4: E2M1 codes times a power of two for each group of 32.

Stacked experts of gpt-oss have `X_blocks` U8 (experts, out, in / 32, 16) and `X_scales` U8
(experts, out, in / 32); the parameter X of the plain model is (experts, in, out). Others store
(…, out, in / 2) and (…, out, in / 32): compressed-tensors `weight_packed` U8 and `weight_scale`,
quark and ModelOpt `weight` U8 and `weight_scale`, DeepSeek-V4 `weight` I8 and `scale` F8_E8M0.
Scales are E8M0, as bytes or in that type. Values are exact in BF16.

Sources: transformers 5.23 (`convert_moe_packed_tensors`), compressed-tensors 0.20, DeepSeek-V4's
`convert.py` as transformers reads it.
"""

from __future__ import annotations

import numpy as np

from loratools.base.codecs.bits import E2M1, eights, fours, packed, powers, times_groups
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
from loratools.base.codecs.levels import float_codes, rounded
from loratools.base.codecs.parts import Columns, matrix_rows
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

_GROUP = 32
_BYTES = _GROUP // 2
_EXPONENTS = ("U8", "F8_E8M0")
_BLOCKS, _SCALES = "_blocks", "_scales"
_TOGETHER = 8 * _GROUP  # inputs of experts that are encoded together


class _Experts(CodedWeight):
    """Experts of gpt-oss, stored (experts, out, groups, 16), meant (experts, in, out)."""

    together = _GROUP

    def __init__(self, key: str, codes: TensorRef, scales: TensorRef) -> None:
        experts, out, groups, _ = codes.shape
        self._codes = Columns(codes, out, groups * _BYTES)
        self._scales = Columns(scales, out, groups)
        shape = (experts, groups * _GROUP, out)
        super().__init__(key, shape, DTYPES["BF16"], (codes, scales), Scheme("MXFP4", 4, _GROUP))

    def rows(self, start: int, stop: int) -> Array:
        """Return rows, which are inputs of experts, in float32."""
        _, height, out = self.shape
        blocks = []
        at = start
        while at < stop:
            expert, first = divmod(at, height)
            last = min(height, first + stop - at)
            low, high = first // _GROUP, -(-last // _GROUP)
            values = self._inputs(expert, low, high)
            blocks.append(values[first - low * _GROUP : last - low * _GROUP])
            at += last - first
        if len(blocks) == 1:
            return blocks[0]
        return np.concatenate(blocks) if blocks else np.empty((0, out), np.float32)

    def _inputs(self, expert: int, low: int, high: int) -> Array:
        """Return the inputs of an expert that are groups [low, high): F32 (inputs, out)."""
        out = self.shape[-1]
        # Codes are turned before they become numbers four times as large.
        data = np.ascontiguousarray(self._codes.read(low * _BYTES, high * _BYTES, expert))
        turned = np.ascontiguousarray(data.T)
        codes = np.empty((len(turned), 2, out), np.uint8)
        np.bitwise_and(turned, 15, out=codes[:, 0])
        np.right_shift(turned, 4, out=codes[:, 1])
        values = eights(codes, E2M1).reshape(high - low, _GROUP, out)
        scales = powers(self._scales.read(low, high, expert))
        values *= np.ascontiguousarray(scales.T)[:, None, :]
        return values.reshape(-1, out)

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales."""
        return CodesOnly(self.parts[0], self.scheme, self._encoded, _TOGETHER)

    def _encoded(self, start: int, values: Array) -> Encoded:
        """Encode inputs of one expert, which are columns of what is stored."""
        _, height, out = self.shape
        expert, first = divmod(start, height)
        low, high = first // _GROUP, (first + len(values)) // _GROUP
        scales = powers(self._scales.read(low, high, expert))
        codes, meant = _nearest(np.ascontiguousarray(values.T), scales)
        width = height // 2
        at = low * _BYTES
        pieces = stripes(self.parts[0], width, at, packed(codes, 4), expert * out)
        return Encoded(rounded(meant.T, self.dtype), pieces)


class _Pairs(CodedWeight):
    """Codes along the inputs, as every other maker stores them."""

    def __init__(self, key: str, codes: TensorRef, scales: TensorRef) -> None:
        self._codes, self._scales = codes, scales
        *stack, half = codes.shape
        parts = (codes, scales)
        scheme = Scheme("MXFP4", 4, _GROUP)
        super().__init__(key, (*stack, half * 2), DTYPES["BF16"], parts, scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32."""
        values = fours(matrix_rows(self._codes, start, stop).view(np.uint8), E2M1)
        return times_groups(values, powers(matrix_rows(self._scales, start, stop).view(np.uint8)))

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales."""
        return CodesOnly(self._codes, self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        stored = matrix_rows(self._scales, start, start + len(values)).view(np.uint8)
        codes, meant = _nearest(values, powers(stored))
        pieces = [row_piece(self._codes, start, packed(codes, 4))]
        return Encoded(rounded(meant, self.dtype), pieces)


def _nearest(values: Array, scales: Array) -> tuple[Array, Array]:
    """Return the codes of rows, and what they mean: U8 and F32 (rows, width)."""
    grouped = values.reshape(*scales.shape, _GROUP)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        codes = float_codes(grouped / scales[:, :, None], "F4_E2M1").reshape(values.shape)
    return codes, times_groups(E2M1[codes], scales)


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for name, codes in stored.named(_BLOCKS).items():
        if len(codes.shape) == 4 and f"{name}{_SCALES}" in stored.tensors:
            shape = codes.shape[:-1]
            scales = sibling(stored.tensors, f"{name}{_SCALES}", ("U8",), shape)
            sibling(stored.tensors, codes.key, ("U8",), (*shape, _BYTES))
            found[name] = _Experts(name, codes, scales)
        elif codes.dtype.floating and ".experts." in f".{name}.":
            raise UnsupportedError(
                "a tensor of gpt-oss's experts has the name of packed codes and holds plain "
                "numbers",
                tensor=codes.key,
                got=codes.dtype.code,
                expected="U8, with scales beside them",
                hint=f"transformers saved it so; rename the tensor to {name.rpartition('.')[2]}",
            )
    for leaf, scale, kinds in (
        (".weight_packed", "weight_scale", ("U8",)),
        (".weight", "weight_scale", ("U8",)),
        (".weight", "scale", ("I8", "U8")),
    ):
        for module, codes in stored.named(leaf).items():
            scales_ref = stored.tensors.get(f"{module}.{scale}")
            if codes.dtype.code not in kinds or scales_ref is None or len(codes.shape) < 2:
                continue
            groups, rest = divmod(codes.shape[-1], _BYTES)
            if scales_ref.dtype.code not in _EXPONENTS or rest:
                continue
            if scales_ref.shape != (*codes.shape[:-1], groups):
                raise wrong_shape(scales_ref, [*codes.shape[:-1], f"{codes.shape[-1]} / 16"])
            key = f"{module}.weight"
            found[key] = _Pairs(key, codes, scales_ref)
    return found


CODEC = Codec("MXFP4", ("mxfp4", "quark", "compressed-tensors", "modelopt", "fp8"), _declare)
