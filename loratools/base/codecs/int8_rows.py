"""LLM.int8 of bitsandbytes: signed codes times the largest absolute value of their row, over 127.

A weight X.weight is I8 (out, in), X.SCB F32 (out,) and X.weight_format, whose 0 says that rows lie
one behind the other; older versions had orders of their own for the GPU. Read only: bitsandbytes
makes new codes from 16 bits when it loads a model.

Source: bitsandbytes 0.50, `int8_vectorwise_dequant` and `Linear8bitLt`.
"""

from __future__ import annotations

import numpy as np

from loratools.base.codecs.codec import Codec, CodedWeight, Scheme, Stored
from loratools.base.codecs.parts import matrix_rows
from loratools_formats.checkpoints.siblings import sibling, wrong_shape
from loratools_formats.core.dtypes import DTYPES, Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

_SCALES, _ORDER = ".SCB", ".weight_format"
_STEP = np.float32(7.874015718698502e-3)  # 1/127, as bitsandbytes has it


class _Rows(CodedWeight):
    """Code · scale / 127."""

    def __init__(self, key: str, codes: TensorRef, scales: TensorRef, others: list[TensorRef],
                 dtype: str) -> None:  # fmt: skip
        self._codes, self._scales = codes, scales
        parts = (codes, scales, *others)
        super().__init__(key, codes.shape, DTYPES[dtype], parts, Scheme("LLM.int8", 8))

    def rows(self, start: int, stop: int) -> Array:
        """Return rows in float32, multiplied in bitsandbytes' order."""
        values: Array = matrix_rows(self._codes, start, stop).astype(np.float32)
        values *= self._scales.elements(start, stop)[:, None]
        values *= _STEP
        return values


def _declare(stored: Stored) -> dict[str, CodedWeight]:
    found: dict[str, CodedWeight] = {}
    for module in stored.named(_SCALES):
        key = f"{module}.weight"
        codes = stored.tensors.get(key)
        if codes is None or codes.dtype.code != "I8":
            continue
        if len(codes.shape) != 2:
            raise wrong_shape(codes, "a matrix")
        scales = sibling(stored.tensors, module + _SCALES, ("F32",))
        if scales.numel != codes.shape[0]:
            raise wrong_shape(scales, [codes.shape[0]])
        order = stored.tensors.get(module + _ORDER)
        if order is not None and (order.numel != 1 or order.load().reshape(-1)[0] != 0):
            raise UnsupportedError(
                "LLM.int8 of bitsandbytes in an order of the GPU is not supported",
                tensor=order.key,
                expected="0, rows one behind the other",
                hint="Save the model again with bitsandbytes 0.45 or later",
            )
        others = [] if order is None else [order]
        found[key] = _Rows(key, codes, scales, others, stored.dtype)
    return found


CODEC = Codec("LLM.int8 of bitsandbytes", ("bitsandbytes",), _declare)
