"""Element types: sizes, rounding and the hand-over, against ml_dtypes, NumPy and torch."""

import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools_formats.core.dtypes import DTYPES, decode, encode, round_into, to_torch
from loratools_formats.disk.errors import MissingDependencyError, UnsupportedError

WHOLE = [dtype for dtype in DTYPES.values() if dtype.numpy and dtype.bits >= 8]
REAL = ["F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


@pytest.mark.parametrize("dtype", WHOLE, ids=lambda dtype: dtype.code)
def test_sizes(dtype):
    assert dtype.numpy_dtype().itemsize * 8 == dtype.bits
    assert dtype.nbytes((3, 5)) == 15 * dtype.bits // 8
    assert dtype.nbytes(()) == dtype.bits // 8
    assert dtype.nbytes((0, 7)) == 0


@pytest.mark.parametrize(
    ("code", "shape", "nbytes"),
    [("F4", (4,), 2), ("F4", (3,), None), ("F6_E2M3", (4,), 3), ("F6_E3M2", (2,), None)],
)
def test_sizes_below_a_byte(code, shape, nbytes):
    assert DTYPES[code].nbytes(shape) == nbytes


def test_factors_may_be_of_whole_real_bytes_only():
    assert {d.code for d in DTYPES.values() if d.floating} == {*REAL, "F8_E8M0"}


@pytest.mark.parametrize("dtype", WHOLE, ids=lambda dtype: dtype.code)
def test_bits_survive(dtype):
    data = np.random.default_rng(0).integers(0, 2, 240, np.uint8).tobytes()
    shape = (6, 40 * 8 // dtype.bits)
    array = decode(data, dtype, shape)
    assert array.shape == shape
    assert encode(array, dtype).tobytes() == data
    tensor = to_torch(data, dtype, shape)
    assert tuple(tensor.shape) == shape
    assert tensor.view(torch.uint8).numpy().tobytes() == data


def test_big_endian_arrays_are_stored_little_endian():
    assert encode(np.array([1, 2], dtype=">i4"), DTYPES["I32"]).tobytes() == b"\1\0\0\0\2\0\0\0"


@pytest.mark.parametrize("code", REAL)
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_rounding_as_torch(code, values):
    """To nearest, ties to even; overflow and NaN as torch has them, in silence."""
    if code in ("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        # torch saturates or not by version; compare what is in range
        limit = float(torch.finfo(getattr(torch, DTYPES[code].torch)).max)
        values = [value for value in values if abs(value) <= limit]
    array = np.array(values, dtype=np.float32)
    ours = encode(array, DTYPES[code]).astype(np.float64)
    theirs = torch.from_numpy(array).to(getattr(torch, DTYPES[code].torch)).to(torch.float64)
    np.testing.assert_array_equal(ours, theirs.numpy())


def test_rounding_of_doubles():
    """Half a step of bfloat16 and, near a tie, half a step of float32."""
    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(10_000), [1 + 2**-8 + 2**-40]]
    )
    error = np.abs(encode(values, DTYPES["BF16"]).astype(float) - values)
    assert (error <= 2.0 ** (np.floor(np.log2(np.abs(values))) - 8) * (1 + 2**-16)).all()
    halves = encode(np.array([1 + 2**-11 + 2**-40, 1 + 2**-11]), DTYPES["F16"]).astype(float)
    assert halves.tolist() == [1 + 2**-10, 1.0]


def test_overflow_is_silent_and_visible():
    with np.errstate(all="raise"):
        assert np.isinf(encode(np.array([1e30]), DTYPES["F16"])).all()
        assert np.isnan(encode(np.array([np.nan]), DTYPES["BF16"])).all()


def test_pairs_of_4_bits():
    values = decode(bytes([0x10, 0x32, 0x54, 0x76]), DTYPES["F4"], (2, 4)).astype(float)
    assert values.tolist() == [[0, 0.5, 1, 1.5], [2, 3, 4, 6]]
    assert decode(b"\x9a", DTYPES["F4"], (2,)).astype(float).tolist() == [-1, -0.5]


def test_pairs_of_4_bits_in_torch():
    tensor = to_torch(bytes(4), DTYPES["F4"], (2, 4))
    assert tuple(tensor.shape) == (2, 2)
    for shape in ((4, 1), ()):
        with pytest.raises(UnsupportedError):
            to_torch(bytes(2), DTYPES["F4"], shape)


@pytest.mark.parametrize("code", ["F6_E2M3", "F6_E3M2"])
def test_types_that_can_only_be_copied(code):
    for convert in (decode, to_torch):
        with pytest.raises(UnsupportedError, match=code):
            convert(bytes(3), DTYPES[code], (4,))


def test_torch_tensors_have_memory_of_their_own():
    data = bytearray(8)
    tensor = to_torch(data, DTYPES["F32"], (2,))
    data[:] = b"\xff" * 8
    assert tensor.tolist() == [0, 0]
    tensor += 1
    assert tensor.tolist() == [1, 1]


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match="pip install torch"):
        to_torch(bytes(4), DTYPES["F32"], (1,))


def test_types_of_ml_dtypes_are_all_known():
    used = {dtype.numpy[3:] for dtype in DTYPES.values() if (dtype.numpy or "").startswith("ml:")}
    assert all(hasattr(ml_dtypes, name) for name in used)


def test_float64_is_rounded_to_bfloat16_once():
    """Just beside a tie, above and below it, where float32 would already have met the tie."""
    ties = np.array([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 2.0**-130 * 1.5, 3.0e38])
    values = np.concatenate([ties * (1 + s * 2.0**-40) for s in (-1, 0, 1)])
    values = np.concatenate([values, -values, [0.0, -0.0, np.inf, np.nan]])
    out = np.empty(values.shape, ml_dtypes.bfloat16)
    round_into(values, out)
    _, exponent = np.frexp(values[:-4])
    step = np.maximum(exponent, -125) - 8
    exact = np.ldexp(np.rint(np.ldexp(values[:-4], -step)), step)
    assert np.array_equal(out[:-4].astype(np.float64), exact)
    assert not np.array_equal(values.astype(np.float32).astype(out.dtype)[:-4], out[:-4])
    assert str(out[-4:].astype(np.float32).tolist()) == "[0.0, -0.0, inf, nan]"
