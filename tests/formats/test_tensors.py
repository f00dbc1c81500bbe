"""References to tensors: views, conversions and arrays in memory."""

import ml_dtypes
import numpy as np
import pytest
from handmade import SOUND, VALUES, A, B, container

from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.containers.safetensors_write import write_safetensors
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import in_file, in_memory
from loratools_formats.disk.errors import AdapterError, UnsupportedError

ARRAYS = {
    "scalar": np.array(3.5),
    "vector": np.arange(5, dtype="i8"),
    "matrix": np.arange(6, dtype="f4").reshape(2, 3),
    "transposed": np.arange(6, dtype="f4").reshape(2, 3).T,
    "strided": np.arange(24, dtype="u2").reshape(4, 6)[::2, ::3],
    "big-endian": np.arange(4, dtype=">f8"),
    "empty": np.zeros((3, 0), "f2"),
    "booleans": np.array([True, False]),
    "bfloat16": np.arange(4).astype(ml_dtypes.bfloat16),
    "float8": np.arange(4).astype(ml_dtypes.float8_e5m2),
}


@pytest.fixture
def opened(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(container(SOUND, VALUES))
    return read_safetensors(path)


@pytest.mark.parametrize("name", ARRAYS)
def test_in_memory(name, tmp_path):
    array = ARRAYS[name]
    tensor = in_memory("x", array)
    assert tensor.shape == array.shape
    assert tensor.numel == array.size
    assert tensor.nbytes == array.nbytes == len(bytes(tensor.raw()))
    np.testing.assert_array_equal(tensor.load(), array)
    write_safetensors(tmp_path / "f", [tensor], {})
    np.testing.assert_array_equal(read_safetensors(tmp_path / "f").tensors["x"].load(), array)


def test_in_memory_as_another_type():
    tensor = in_memory("x", np.array([1.0, 1 + 2**-8]), "BF16")
    assert tensor.dtype == DTYPES["BF16"]
    assert tensor.load("f8").tolist() == [1.0, 1.0]


@pytest.mark.parametrize("array", [np.zeros(2, np.longdouble), np.array(["x"]), np.zeros(2, "c16")])
def test_types_without_a_name(array):
    with pytest.raises(AdapterError, match="no safetensors name"):
        in_memory("x", array)


@pytest.mark.parametrize("code", ["F4", "F6_E2M3"])
def test_types_below_a_byte(code):
    with pytest.raises(UnsupportedError, match=code):
        in_memory("x", np.zeros((2, 4)), code)


def test_nothing_is_cached(opened, monkeypatch):
    reads = []
    original = type(opened.file).read_at
    monkeypatch.setattr(
        type(opened.file), "read_at", lambda *a: reads.append(a[1:]) or original(*a)
    )
    tensor = opened.tensors[B]
    start = len(container(SOUND))
    assert (tensor.shape, tensor.nbytes, reads) == ((24, 8), 768, [])
    tensor.load()
    tensor.load("f8")
    tensor.torch()
    assert reads == [(start + 640, 768)] * 3


def test_loaded_arrays_are_independent(opened):
    assert not np.shares_memory(opened.tensors[A].load(), opened.tensors[A].load())
    assert opened.tensors[A].load("f8").dtype == np.float64


def test_renamed_and_reshaped_keep_the_place_in_the_file(opened):
    tensor = opened.tensors[A].renamed("y").reshaped((4, 5, 8))
    assert (tensor.key, tensor.shape) == ("y", (4, 5, 8))
    assert (tensor.file, tensor.offset) == (opened.file, opened.tensors[A].offset)
    assert tensor.raw() == opened.tensors[A].raw()
    assert opened.tensors[A].shape == (8, 20)


def test_reshaped_to_another_size(opened):
    with pytest.raises(AdapterError, match="shape does not fit"):
        opened.tensors[A].reshaped((8, 21))


@pytest.mark.parametrize("code", ["U8", "BF16", "F32", "F64", "C64"])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)])
def test_transposed(code, axes):
    array = np.arange(24).reshape(2, 3, 4)
    tensor = in_memory("x", array, code).transposed(axes)
    assert tensor.shape == array.transpose(axes).shape
    np.testing.assert_array_equal(tensor.load("c8"), array.transpose(axes))
    assert tensor.file is None, "its bytes are no longer those of a file"


def test_transposed_keeps_every_bit():
    data = np.frombuffer(np.random.default_rng(0).bytes(48), "f4").reshape(3, 4)
    tensor = in_memory("x", data).transposed((1, 0))
    assert bytes(tensor.raw()) == data.view("u4").T.tobytes()
    assert bytes(tensor.transposed((1, 0)).raw()) == data.tobytes()


def test_signalling_nans_load_in_silence():
    tensor = in_memory("x", np.array([0x7F800001], "u4").view("f4"))
    assert np.isnan(tensor.load("f8")).all()
    assert np.isinf(in_memory("x", np.array([1e300])).load("f4")).all()


def test_in_file(tmp_path):
    class Source:
        def read_at(self, offset, nbytes):
            return bytes(range(offset, offset + nbytes))

    tensor = in_file("x", DTYPES["U8"], (2, 3), Source(), 7)
    assert tensor.load().tolist() == [[7, 8, 9], [10, 11, 12]]
