"""Exact rounding to a stored type, and how far stored values are from it; no code of ours."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from loratools_formats.core.dtypes import Array

BITS = {"bfloat16": 8, "float16": 11, "float32": 24}
LOWEST = {"bfloat16": -126, "float16": -14, "float32": -126}
TYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype("f2"), "f32": np.dtype("f4")}
_AS_INTEGERS = {2: np.int16, 4: np.int32}


def rounded(exact: Array, dtype: np.dtype[Any]) -> Array:
    """Round float64 once, to nearest, ties to even; NumPy goes to bfloat16 by way of float32."""
    _, exponent = np.frexp(exact)
    step = np.maximum(exponent, LOWEST[dtype.name] + 1) - BITS[dtype.name]
    return np.ldexp(np.rint(np.ldexp(exact, -step)), step).astype(dtype)


def distances(stored: Array, exact: Array) -> Array:
    """Return by how many units in the last place each value is off the exact one, rounded."""
    one, other = (_ordered(array) for array in (stored, rounded(exact, stored.dtype)))
    return np.abs(one - other)


def assert_rounded_once(stored: Array, exact: Array, *, unequal: float = 1e-4) -> None:
    """At most a share of `unequal` differs from the exact values rounded once, and by one ulp."""
    off = distances(stored, exact)
    assert off.max(initial=0) <= 1, f"{off.max()} ulp"
    assert off.sum() <= max(1, unequal * off.size), f"{off.sum()} of {off.size} differ"


def _ordered(array: Array) -> Array:
    """Return integers in the order of the values, neighbours one apart, both zeros the same."""
    kind = _AS_INTEGERS[array.dtype.itemsize]
    bits = np.atleast_1d(array).view(kind).astype(np.int64)
    return np.where(bits < 0, np.iinfo(kind).min - bits, bits)


EPS = float(np.finfo(np.float64).eps)


def assert_equal_products(found, expected, terms):
    """Entries are equal but for the order in which float64 sums of `terms` terms were formed.

    Each side is within terms · ε/2 · ‖b‖‖a‖ of b @ a (Higham, Accuracy and Stability, 3.5); the 16
    leaves room for factors whose norms multiply to more than that of their product.
    """
    limit = 16 * terms * EPS * float(np.linalg.norm(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
