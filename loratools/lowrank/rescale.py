"""Moving a scale into the factors, half of it into each, so that every loader sees scale 1.

Exact where the scale is a power of two and no value leaves the range of its type. Otherwise the
values are rounded, which happens only if it is asked for.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import encode, is_power_of_two
from loratools_formats.core.tensors import TensorRef


def folded(delta: ModuleChange, *, rounding: bool = False) -> ModuleChange:
    """Return a delta of scale 1.

    Args:
        delta: any; a change without factors is returned unchanged.
        rounding: whether values may be rounded; if not, a scale that cannot be moved exactly stays.
    """
    part = delta.factors
    return delta if part is None else delta.with_direction(_folded(part, rounding))


def of_positive_scale(delta: ModuleChange) -> ModuleChange:
    """Return a delta whose scale is above 0: `b` takes up a sign, and is 0 for a scale of 0.

    Loaders and formats disagree on scales of 0 and below; the factors say the same exactly.
    """
    part = delta.factors
    if part is None or part.scale > 0:
        return delta
    sign, scale = (-1.0, -part.scale) if part.scale < 0 else (0.0, 1.0)
    return delta.with_direction(
        replace(
            part,
            b=_times(part.b, sign),
            bias=None if part.bias is None else _times(part.bias, sign),
            scale=scale,
            alpha=None if part.alpha is None else scale * part.rank,
            alpha_tensor=None,
        )
    )


def _folded(delta: LowRank, rounding: bool) -> LowRank:
    if delta.scale == 1.0 or delta.scale == 0.0:
        return delta
    on_b, on_a = _shares(delta.scale)
    tensors = [(delta.b, on_b), (delta.a, on_a)]
    if delta.bias is not None:
        tensors.append((delta.bias, delta.scale))
    if not rounding and not all(_is_exact(tensor, factor) for tensor, factor in tensors):
        return delta
    return replace(
        delta,
        a=_times(delta.a, on_a),
        b=_times(delta.b, on_b),
        bias=None if delta.bias is None else _times(delta.bias, delta.scale),
        scale=1.0,
        alpha=None if delta.alpha is None else float(delta.rank),
        alpha_tensor=None,
    )


def _shares(scale: float) -> tuple[float, float]:
    """Return factors of `b` and `a`, powers of two if the scale is one.

    >>> _shares(0.5), _shares(-16.0)
    ((1.0, 0.5), (-4.0, 4.0))
    """
    sign = math.copysign(1.0, scale)
    if not is_power_of_two(scale):
        return sign * math.sqrt(abs(scale)), math.sqrt(abs(scale))
    power = math.frexp(scale)[1] - 1
    half = power // 2
    return sign * 2.0 ** (power - half), 2.0**half


def _is_exact(tensor: TensorRef, factor: float) -> bool:
    if not is_power_of_two(factor):
        return False
    wanted = tensor.load(np.float64) * factor
    return np.array_equal(encode(wanted, tensor.dtype).astype(np.float64), wanted)


def _times(tensor: TensorRef, factor: float) -> TensorRef:
    if factor == 1.0:
        return tensor

    def read() -> memoryview:
        values = encode(tensor.load(np.float64) * factor, tensor.dtype)
        return values.reshape(-1).view(np.uint8).data

    return TensorRef(tensor.key, tensor.dtype, tensor.shape, read)
