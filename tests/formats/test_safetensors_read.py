"""The header reader: every defect, and never another opinion than the safetensors library."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from handmade import BOMBS, DEFECTS, SOUND, VALUES, A, B, container, entry, one_more
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open

from loratools_formats.containers.safetensors_read import Limits, read_safetensors
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError, MissingFileError

# What the library accepts and we do not: two parsers may read it differently, or it is hostile.
STRICTER = {
    "space before the brace",
    "same tensor twice, escaped",
    "same field twice",
    "same metadata twice",
    "unknown field",
    "shape 0 × 2^63",
    "nine dimensions",
    "100,000 dimensions",
    "name with ESC",
    "name with NUL",
    "name with bidi override",
    "name of 513 bytes",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "a.safetensors"


def library_view(content):
    """Return what the library finds: {name: (dtype, shape, bytes)}, or None if it refuses."""
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}


def our_view(content, path):
    path.write_bytes(content)
    opened = read_safetensors(path)
    return {
        name: (tensor.dtype.code, list(tensor.shape), bytes(tensor.raw()))
        for name, tensor in opened.tensors.items()
    }


def assert_refused_or_equal(content, path):
    """Check that we refuse with our own error, or see what the library sees."""
    try:
        ours = our_view(content, path)
    except AdapterError:
        return False
    assert ours == library_view(content)
    with safe_open(path, "numpy") as library:
        assert (library.metadata() or {}) == read_safetensors(path).metadata
    return True


def test_sound(place):
    place.write_bytes(container(SOUND, VALUES))
    opened = read_safetensors(place)
    assert list(opened.tensors) == [A, B]
    assert opened.tensors[B].load().tolist()[-1][-1] == 1.0
    assert opened.metadata == {}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect(defect, place):
    content, word = DEFECTS[defect]
    place.write_bytes(content)
    with pytest.raises(AdapterError, match=word.replace("<", ".")) as caught:
        read_safetensors(place)
    assert str(place) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000 + len(str(place))
    if defect not in STRICTER:
        assert library_view(content) is None


@pytest.mark.parametrize("defect", BOMBS)
def test_bomb(defect, place):
    make, word = BOMBS[defect]
    place.write_bytes(make())
    with pytest.raises(AdapterError, match=word):
        read_safetensors(place)


def test_failed_reads_keep_no_descriptor(place):
    place.write_bytes(DEFECTS["hole"][0])
    before = os.listdir("/dev/fd")
    for _ in range(3):
        with pytest.raises(AdapterError):
            read_safetensors(place)
    assert os.listdir("/dev/fd") == before


@pytest.mark.parametrize(
    "limits",
    [Limits(header_bytes=64), Limits(tensors=1), Limits(dimensions=1), Limits(name_bytes=9)],
)
def test_limits(limits, place):
    place.write_bytes(container(SOUND, VALUES))
    with pytest.raises(AdapterError):
        read_safetensors(place, limits)


def test_limit_of_metadata(place):
    place.write_bytes(container({"__metadata__": {"k": "123"}}))
    assert read_safetensors(place, Limits(metadata_bytes=4)).metadata == {"k": "123"}
    with pytest.raises(AdapterError, match="metadata"):
        read_safetensors(place, Limits(metadata_bytes=3))


def test_padding_and_no_tensors(place):
    place.write_bytes(container(b"{}      "))
    assert read_safetensors(place).tensors == {}


def test_special_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", tmp_path, tmp_path / "fifo"):
        with pytest.raises(AdapterError, match="not a regular file"):
            read_safetensors(path)
    with pytest.raises(MissingFileError):
        read_safetensors(tmp_path / "missing")


def file_of(code, shape=(4, 6)):
    """Return a file with one tensor of random bits."""
    nbytes = DTYPES[code].nbytes(shape)
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8).tobytes()
    if code == "BOOL":
        data = bytes(byte & 1 for byte in data)
    return container({"x": entry(code, list(shape), 0, nbytes)}, data), data


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6), (8,), (0, 3)])
def test_every_dtype_as_the_library(code, shape, place):
    content, data = file_of(code, shape)
    assert our_view(content, place) == library_view(content) == {"x": (code, list(shape), data)}


TORCH_TYPES = sorted(code for code in DTYPES if DTYPES[code].torch)


@pytest.mark.parametrize("code", TORCH_TYPES)
def test_torch_as_the_library(code, place):
    place.write_bytes(file_of(code)[0])
    ours = read_safetensors(place).tensors["x"].torch()
    with safe_open(place, "pt") as library:
        theirs = library.get_tensor("x")
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("code", [code for code in TORCH_TYPES if code not in ("F4", "F8_E8M0")])
def test_values_as_torch(code, place):
    """Every bit pattern of 8 bits, and many of more, decode to the values torch gives them."""
    place.write_bytes(file_of(code, (64, 256))[0])
    tensor = read_safetensors(place).tensors["x"]
    wide = "complex64" if code == "C64" else "float64"
    theirs = tensor.torch().to(getattr(torch, wide)).numpy()
    np.testing.assert_array_equal(tensor.load(wide), theirs)


def test_values_of_the_types_torch_does_not_convert(place):
    place.write_bytes(container({"x": entry("F4", [4], 0, 2)}, bytes([0x21, 0xF7])))
    assert read_safetensors(place).tensors["x"].load(float).tolist() == [0.5, 1.0, 6.0, -6.0]
    place.write_bytes(container({"x": entry("F8_E8M0", [3], 0, 3)}, bytes([126, 127, 130])))
    assert read_safetensors(place).tensors["x"].load(float).tolist() == [0.5, 1.0, 8.0]


def test_beyond_4_gib(tmp_path):
    """A sparse file, with a tensor that starts after 2^32 and a hole of zeros before it."""
    path, large = tmp_path / "large.safetensors", (1 << 32) + 40
    header = container(
        {"x": entry("U8", [large], 0, large), "y": entry("F32", [3], large, large + 12)}
    )
    with open(path, "wb") as file:
        file.write(header)
        file.seek(len(header) + large)
        file.write(np.float32([1, 2, 3]).tobytes())
    opened = read_safetensors(path)
    assert opened.tensors["y"].load().tolist() == [1, 2, 3]
    with safe_open(path, "numpy") as library:
        assert library.get_tensor("y").tolist() == [1, 2, 3]
    assert opened.tensors["x"].nbytes == large


SMALL = container(
    {"__metadata__": {"k": "v"}, "a": entry("F32", [2], 0, 8), "b": entry("U8", [3], 8, 11)},
    bytes(range(11)),
)


def test_truncated_anywhere(place):
    for length in range(len(SMALL)):
        place.write_bytes(SMALL[:length])
        with pytest.raises(AdapterError):
            read_safetensors(place)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_flipped_anywhere(flip, place):
    accepted = [
        assert_refused_or_equal(SMALL[:i] + bytes([SMALL[i] ^ flip]) + SMALL[i + 1 :], place)
        for i in range(len(SMALL))
    ]
    assert all(accepted[-11:]), "data may be anything"
    assert not any(accepted[:8]), "every bit of the length matters"


@st.composite
def sound_headers(draw):
    """Return the header and data of a small sound file."""
    names = draw(st.lists(st.text("ab.é _0", max_size=6), min_size=1, max_size=4, unique=True))
    header, end = {}, 0
    for name in names:
        code = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4, 8]), max_size=3))
        nbytes = DTYPES[code].nbytes(tuple(shape))
        if nbytes is None:
            shape, nbytes = [*shape, 4], DTYPES[code].nbytes((*shape, 4))
        header[name] = entry(code, shape, end, end + nbytes)
        end += nbytes
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text("kv"), st.text('xé"\n'), max_size=2))
    return header, bytes(i % 251 for i in range(end))


ODD_VALUES = st.sampled_from(
    [-1, 0, 1, 2, 3, 7, 8, 1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64, 1.0, 1e300, True, None, "8"]
) | st.integers(0, 40)


@st.composite
def mutated(draw):
    """Return a sound file with one mutation of its header, length or data."""
    header, data = draw(sound_headers())
    tensors = [name for name in header if name != "__metadata__"]
    name, other = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
    kind = draw(
        st.sampled_from(["offset", "shape", "dtype", "swap", "drop", "data", "text", "length"])
    )
    if kind == "offset":
        header[name]["data_offsets"][draw(st.integers(0, 1))] = draw(ODD_VALUES)
    elif kind == "shape":
        shape = header[name]["shape"]
        place = draw(st.integers(0, len(shape)))
        shape[place : place + draw(st.integers(0, 1))] = [draw(ODD_VALUES)]
    elif kind == "dtype":
        header[name]["dtype"] = draw(st.sampled_from([*sorted(DTYPES), "F128", "", None, 3]))
    elif kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "drop":
        del header[name]
    elif kind == "data":
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9))
    text = json.dumps(header, ensure_ascii=draw(st.booleans())).encode()
    length = len(text)
    if kind == "text":
        at, cut = draw(st.integers(0, length)), draw(st.integers(0, 2))
        text = text[:at] + draw(st.binary(max_size=2) | st.sampled_from([b",", b"}", b"\\u", b"0"]))
        text += json.dumps(header).encode()[at + cut :]
        length = len(text)
    elif kind == "length":
        length = draw(st.integers(0, length + len(data) + 2))
    return struct.pack("<Q", length) + text + data


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(made=sound_headers())
def test_sound_files_are_read_as_the_library_reads_them(made, place):
    content = container(*made)
    assert our_view(content, place) == library_view(content)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(content=mutated())
def test_mutated_files_are_refused_or_read_as_the_library_reads_them(content, place):
    assert_refused_or_equal(content, place)


def test_truncated_while_open(place):
    place.write_bytes(container(SOUND, VALUES))
    opened = read_safetensors(place)
    os.truncate(place, place.stat().st_size - 4)
    assert opened.tensors[A].load().shape == (8, 20)
    with pytest.raises(AdapterError, match="ended while"):
        opened.tensors[B].load()
    with pytest.raises(AdapterError, match="changed while"):
        opened.file.check_unchanged()


def test_metadata_may_be_null_as_mlx_writes_it(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(one_more(b'"__metadata__"', b"null"))
    file = read_safetensors(path)
    assert file.metadata == {}
    assert set(file.tensors) == {A, B}
