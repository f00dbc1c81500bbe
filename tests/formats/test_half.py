"""Float16 to float32 and back: NumPy's bits, for every number and on both sides of every tie."""

from __future__ import annotations

import numpy as np
import pytest

from loratools_formats.core import dtypes, half

ALL = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def bits(values):
    return values.view(f"u{values.dtype.itemsize}")


def in_numpy(values, dtype):
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def around_ties():
    """Every finite float16, every tie between two, the float32 beside each; ends, any bits."""
    finite = np.sort(ALL[np.isfinite(ALL)].astype(np.float32))
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    infinite = np.float32(np.inf)
    ends = [65503, 65504, 65519.996, 65520, 65536, 1e30, np.inf, -np.inf, np.nan, -0.0, 1e-45]
    anything = np.random.default_rng(1).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    beside = [np.nextafter(ties, infinite), np.nextafter(ties, -infinite)]
    return np.concatenate(
        [finite, ties, *beside, np.array(ends, np.float32), anything.view(np.float32)]
    )


def test_every_number_is_widened():
    found = np.empty(ALL.size, np.float32)
    half.widen(ALL, found)
    np.testing.assert_array_equal(bits(found), bits(in_numpy(ALL, np.float32)))


@pytest.mark.parametrize("size", [1, 4095, 1 << 17, (1 << 17) + 1])
def test_numbers_are_rounded_to_nearest_ties_to_even(size):
    values = np.random.default_rng(size).permutation(around_ties())
    for start in range(0, min(len(values), 4 * size), size):
        piece = values[start : start + size]
        found = np.empty(piece.size, np.float16)
        half.narrow(piece, found)
        np.testing.assert_array_equal(bits(found), bits(in_numpy(piece, np.float16)))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f2", np.int16])
def test_conversions_of_any_array_are_numpys(dtype):
    values = np.random.default_rng(2).standard_normal((100, 90)).astype(np.float32)
    for array in (values, values.T, values[:, ::2], values[:2, :3]):
        found = dtypes.converted(array, dtype)
        wanted = in_numpy(array, dtype)
        np.testing.assert_array_equal(found, wanted)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        np.testing.assert_array_equal(
            dtypes.converted(found, np.float32), in_numpy(found, np.float32)
        )
