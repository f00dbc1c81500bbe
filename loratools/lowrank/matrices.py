"""The factors of one pair as arrays, and as matrices that can be decomposed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from loratools.algebra.calibrated import Calibrated
from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Matrix
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import Array
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.disk.errors import AdapterError


def loaded(delta: LowRank, *, narrow: bool = False) -> Iterator[tuple[Array, Array]]:
    """Yield (b, a) of each matrix of a delta in float64.

    Args:
        delta: the factors.
        narrow: in float32, unless they are stored as float64, for what widens blocks that stay in
            the cache at each use: that takes less time than the system takes to hand out memory for
            all of them once. Do not compute with such arrays as they are.
    """
    wide = np.float32 if narrow and not is_float64(delta) else np.float64
    a, b = delta.a.load(wide), delta.b.load(wide)
    yield from zip(b.reshape(-1, *b.shape[-2:]), a.reshape(-1, *a.shape[-2:]), strict=True)


def matrices(delta: LowRank, device: Device) -> list[Matrix]:
    """Return every matrix of a delta, one per expert.

    Raises:
        AdapterError: a factor holds NaN or infinite values.
    """
    use_gram = not is_float64(delta)
    with np.errstate(invalid="ignore", over="ignore"):
        found = [Matrix(b, a, delta.scale, device, use_gram) for b, a in loaded(delta, narrow=True)]
    _check_finite(delta, found)
    return found


def calibrated(delta: LowRank, moments: Sequence[Array], device: Device) -> list[Calibrated]:
    """Return every matrix of a delta with the second moments of its inputs.

    Raises:
        AdapterError: a factor or a moment holds NaN or infinite values.
    """
    use_gram = not is_float64(delta)
    matrices(delta, device)  # refuses what is not finite
    return [
        Calibrated(b, a, delta.scale, of_inputs, device, use_gram)
        for (b, a), of_inputs in zip(loaded(delta), moments, strict=True)
    ]


def _check_finite(delta: LowRank, found: Sequence[Matrix]) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        finite = all(math.isfinite(matrix.squared_norm) for matrix in found)
    if not finite:
        for tensor in (delta.a, delta.b):
            if not np.isfinite(tensor.load(np.float64)).all():
                raise AdapterError(NOT_FINITE, tensor=tensor.key)
        raise AdapterError("squares of the factors overflow float64", tensor=delta.b.key)


def is_float64(delta: LowRank) -> bool:
    """Return whether a factor is stored as float64, whose rounding hides no floor."""
    return "F64" in (delta.a.dtype.code, delta.b.dtype.code)
