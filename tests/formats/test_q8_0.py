"""Q8_0 against gguf-py, whose bits are those of ggml's reference code."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from loratools_formats.containers.gguf import q8_0

KIND = gguf.GGMLQuantizationType.Q8_0


def normal(size):
    return (size * np.random.default_rng(3).standard_normal((5000, 32))).astype(np.float32)


def halves():
    """Values halfway between two codes, and the float32 on both sides of them."""
    codes = np.random.default_rng(4).integers(-126, 126, (3000, 32)).astype(np.float32)
    values = codes + np.float32(0.5)
    values[::3] = np.nextafter(values[::3], np.float32(np.inf))
    values[1::3] = np.nextafter(values[1::3], np.float32(-np.inf))
    values[:, 0] = 127
    return values


def any_size():
    sizes = 10.0 ** np.random.default_rng(5).integers(-46, 36, (5000, 1))
    return (sizes * np.random.default_rng(6).standard_normal((5000, 32))).astype(np.float32)


def zeros():
    values = normal(1.0)[:60]
    values[::3] = 0.0
    values[1::3, 5:] = -0.0
    values[2, :] = 1e-45
    return values


@pytest.mark.parametrize(
    "values", [normal(0.02), halves(), any_size(), zeros()], ids=["normal", "ties", "any", "zeros"]
)
def test_bytes_and_values_are_those_of_the_library(values):
    with np.errstate(all="ignore"):
        wanted = gguf.quants.quantize(values, KIND)
        decoded = gguf.quants.dequantize(wanted, KIND)
    found = q8_0.encode(values)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(q8_0.decode(found).view(np.uint32), decoded.view(np.uint32))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_does_not_become_finite(value):
    values = normal(1.0)[:3]
    values[1, 7] = value
    assert np.isfinite(q8_0.decode(q8_0.encode(values))).all(axis=1).tolist() == [True, False, True]
