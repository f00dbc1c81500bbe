"""NVFP4 of compressed-tensors and of ModelOpt.

Codes are E2M1, two in a byte along the inputs, the first in the low half. Groups of 16, of 32 in
ModelOpt's weight-only variant, share a scale of type F8_E4M3, and a weight, or each matrix of a
stack, shares a number over all of them. compressed-tensors (`weight_packed`, `weight_global_scale`)
divides by that number, ModelOpt (`weight`, `weight_scale_2`) multiplies with it. Scale and number
make one float32; its product with the code is rounded to 16 bits. MLX's nvfp4 is another format,
and so is ComfyUI's, whose names are ModelOpt's: a file that says nothing of itself is neither.

Sources: compressed-tensors 0.20 (`nvfp4-pack-quantized`), ModelOpt 0.47 (`NVFP4QTensor`).
"""

from __future__ import annotations

import numpy as np

from loratools.base.codecs.bits import E2M1, fours, packed, times_groups
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
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_GROUPS = (16, 32)
_SCALE = "F8_E4M3"


class _Nvfp4(CodedWeight):
    """code · (scale ÷ or × number)."""

    def __init__(
        self,
        key: str,
        codes: TensorRef,
        scales: TensorRef,
        of_all: TensorRef,
        dtype: str,
        *,
        divides: bool,
    ) -> None:
        *stack, half = codes.shape
        self._codes, self._scales, self._of_all = codes, scales, of_all
        self._divides = divides
        scheme = Scheme("NVFP4", 4, half * 2 // scales.shape[-1])
        parts = (codes, scales, of_all)
        super().__init__(key, (*stack, half * 2), DTYPES[dtype], parts, scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32, to be rounded to 16 bits."""
        values = fours(matrix_rows(self._codes, start, stop), E2M1)
        return times_groups(values, self._grid(start, stop))

    def encoder(self) -> Encoder:
        """Return what stores new codes with both old scales."""
        return CodesOnly(self._codes, self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        scales = self._grid(start, start + len(values))
        grouped = values.reshape(*scales.shape, -1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = float_codes(grouped / scales[:, :, None], "F4_E2M1").reshape(values.shape)
        meant = rounded(times_groups(E2M1[codes], scales), self.dtype)
        return Encoded(meant, [row_piece(self._codes, start, packed(codes, 4))])

    def _grid(self, start: int, stop: int) -> Array:
        """Return the scales of rows with the number over all in them: F32 (rows, groups)."""
        scales: Array = matrix_rows(self._scales, start, stop).astype(np.float32)
        numbers: Array = self._of_all.load(np.float32).reshape(-1)
        if len(numbers) > 1:
            height = self.shape[-2]
            numbers = numbers[np.arange(start, stop) // height][:, None]
        return scales / numbers if self._divides else scales * numbers


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for leaf, number, divides in (
        (".weight_packed", "weight_global_scale", True),
        (".weight", "weight_scale_2", False),
    ):
        for module, codes in stored.named(leaf).items():
            of_all = stored.tensors.get(f"{module}.{number}")
            scales = stored.tensors.get(f"{module}.weight_scale")
            is_floating = scales is not None and scales.dtype.code != _SCALE
            if codes.dtype.code != "U8" or of_all is None or is_floating:
                continue  # ModelOpt's W4A8 has floating scales
            key = f"{module}.weight"
            if not (divides or stored.stated or stored.config):
                raise UnsupportedError(
                    "the file does not say whose NVFP4 it has: ComfyUI has the halves of a "
                    "byte and the "
                    "scales in another order than ModelOpt",
                    tensor=codes.key,
                    expected="a config.json beside it, or comfy_quant with the weight",
                    hint="Start from the file as it was published",
                )
            scales = _scales(stored, module, codes)
            _check_number(of_all, codes)
            dtype = "BF16" if divides else stored.dtype
            found[key] = _Nvfp4(key, codes, scales, of_all, dtype, divides=divides)
    return found


def _scales(stored: Stored, module: str, codes: TensorRef) -> TensorRef:
    *stack, half = codes.shape
    if len(codes.shape) < 2 or half * 2 % _GROUPS[0]:
        raise wrong_shape(codes, f"(…, out, in / 2), in a multiple of {_GROUPS[0]}")
    scales = sibling(stored.tensors, f"{module}.weight_scale", (_SCALE,))
    if scales.numel == 1 and half * 2 > _GROUPS[-1]:
        raise UnsupportedError(
            "a weight in NVFP4 has one scale for all, and loaders need one for each group",
            tensor=scales.key,
            got=list(scales.shape),
            expected=[*stack, half * 2 // _GROUPS[0]],
            hint="Start from the original checkpoint; fuse leaves the weight as it is where no "
            "adapter changes it",
        )
    if not any(scales.shape[-1:] == (half * 2 // group,) for group in _GROUPS):
        raise wrong_shape(scales, [*stack, half * 2 // _GROUPS[0]])
    return sibling(stored.tensors, scales.key, (_SCALE,), (*stack, scales.shape[-1]))


def _check_number(of_all: TensorRef, codes: TensorRef) -> None:
    matrices = 1
    for size in codes.shape[:-2]:
        matrices *= size
    if of_all.dtype.code not in ("F32", "BF16", "F16") or of_all.numel not in (1, matrices):
        raise wrong_shape(of_all, f"one number, or {matrices}")
    values = of_all.load(np.float32)
    if not np.isfinite(values).all() or not values.all():
        raise AdapterError(
            "a scale of a quantised weight is zero, NaN or infinite", tensor=of_all.key
        )


CODEC = Codec("NVFP4", ("compressed-tensors", "modelopt"), _declare)
