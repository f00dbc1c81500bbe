"""MXINT4 and NVFP4 with scales of E5M3, which only AutoRound stores.

Both have the tensors of MXFP4, `weight_packed` U8 (out, in / 2), two codes in a byte, the first in
the low half, and `weight_scale` U8 (out, groups); the configuration alone says what they mean.
MXINT4's codes are a sign and three bits of quarters, 0 to 1.75, with an E8M0 scale for each 32
inputs. The other's are E2M1, with an unsigned float of five bits of exponent and three of mantissa
for each 16. Values are exact in BF16.

Source: auto-round 0.16 (`experimental/qmodules/mxint4_utils.py`, `nvfp4_e5m3.py`), whose
llm-compressor form of the second is compressed-tensors' format `nvfp4-e5m3-pack-quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from loratools.base.codecs.bits import fours, looked_up, packed, powers, times_groups
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
from loratools.base.codecs.levels import FOURS, float_codes, rounded
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef

_BYTE = ("U8",)
_NAN = 0xFF


@dataclass(frozen=True)
class _Form:
    """What codes and scales mean.

    Attributes:
        name: for people.
        group: inputs that share a scale.
        kind: of the codes.
        scales: returns what bytes mean as scales, in float32.
    """

    name: str
    group: int
    kind: str
    scales: Callable[[Array], Array]


class _Fours(CodedWeight):
    """A code of four bits times the scale of its group."""

    def __init__(self, key: str, codes: TensorRef, scales: TensorRef, form: _Form) -> None:
        self._codes, self._scales, self._form = codes, scales, form
        shape = (codes.shape[0], codes.shape[1] * 2)
        scheme = Scheme(form.name, 4, form.group)
        super().__init__(key, shape, DTYPES["BF16"], (codes, scales), scheme)

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32."""
        data = matrix_rows(self._codes, start, stop)
        return times_groups(fours(data, FOURS[self._form.kind]), self._grid(start, stop))

    def encoder(self) -> Encoder:
        """Return what stores new codes with the old scales."""
        return CodesOnly(self._codes, self.scheme, self._encoded)

    def _encoded(self, start: int, values: Array) -> Encoded:
        scales = self._grid(start, start + len(values))
        grouped = values.reshape(*scales.shape, -1)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            codes = float_codes(grouped / scales[:, :, None], self._form.kind)
        codes = codes.reshape(values.shape)
        meant = rounded(times_groups(FOURS[self._form.kind][codes], scales), self.dtype)
        return Encoded(meant, [row_piece(self._codes, start, packed(codes, 4))])

    def _grid(self, start: int, stop: int) -> Array:
        return self._form.scales(matrix_rows(self._scales, start, stop))


def _e5m3(codes: Array) -> Array:
    """Return what bytes mean as floats of E5M3 without a sign: NaN for the last, in float32."""
    return looked_up(_e5m3_values(), codes)


@cache
def _e5m3_values() -> Array:
    code = np.arange(256)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(
        exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 15), np.ldexp(mantissa / 8, -14)
    )
    values[_NAN] = np.nan
    return values.astype(np.float32)


_FORMS = {
    "mx_int": _Form("MXINT4", 32, "I4", powers),
    "nvfp4_v2": _Form("NVFP4 with E5M3 scales", 16, "F4_E2M1", _e5m3),
}
_FORMATS = {"nvfp4-e5m3-pack-quantized": "nvfp4_v2"}


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for module, codes in stored.named(".weight_packed").items():
        form = _FORMS.get(_data_type(stored.stated, module))
        if form is None or codes.dtype.code not in _BYTE:
            continue
        if len(codes.shape) != 2 or codes.shape[1] * 2 % form.group:
            raise wrong_shape(codes, f"(out, in / 2), groups of {form.group} inputs")
        grid = (codes.shape[0], codes.shape[1] * 2 // form.group)
        scales = sibling(stored.tensors, f"{module}.weight_scale", _BYTE, grid)
        key = f"{module}.weight"
        found[key] = _Fours(key, codes, scales, form)
    return found


def _data_type(stated: Mapping[str, Any], module: str) -> str:
    """Return what a configuration calls the numbers of a module; empty if it does not say."""
    extra = stated.get("extra_config")
    entries = extra if isinstance(extra, Mapping) else {}
    own = next((entries[name] for name in entries if _is_about(name, module)), None)
    own = own if isinstance(own, Mapping) else {}
    by_format = _FORMATS.get(str(stated.get("format")), "")
    return str(own.get("data_type") or stated.get("data_type") or by_format)


def _is_about(name: str, module: str) -> bool:
    """Return whether the name of an entry is a module, or a pattern for it."""
    if name == module:
        return True
    try:
        return re.fullmatch(name, module) is not None
    except re.error:
        return False


CODEC = Codec("MXINT4 and E5M3", ("auto-round", "compressed-tensors"), _declare)
