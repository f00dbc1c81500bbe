"""The writer: the same bytes, whole or not at all, in little memory."""

import json
import os
import random
import re
import struct
import tracemalloc

import numpy as np
import pytest
from faults import each_failure, watch
from handmade import SOUND, VALUES, container
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.containers.safetensors_write import safetensors_nbytes, write_safetensors
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import AdapterError, OutputError, OutputExistsError

TENSORS = [in_memory(name, np.arange(24, dtype="f4").reshape(4, 6)) for name in "cab"]
METADATA = {f"key {number}": f"value {number}é\n" for number in range(8)}


def bytes_of(code, shape, key="x", data=None):
    """Return a reference to given bytes, right or not."""
    nbytes = DTYPES[code].nbytes(shape) or 0
    held = bytes(nbytes) if data is None else data
    return TensorRef(key, DTYPES[code], shape, lambda: held)


def test_tensors_lie_in_the_order_of_the_library(tmp_path):
    """Of types of one width too."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save

    codes = [code for code, entry in DTYPES.items() if entry.torch and entry.bits >= 8]
    codes = [code for code in codes if "FNUZ" not in code]
    shapes = {code: (8 * 8 // DTYPES[code].bits,) for code in codes}
    path = tmp_path / "ours.safetensors"
    write_safetensors(path, [bytes_of(code, shapes[code], key=code) for code in codes], {})
    theirs = {c: torch.zeros(shapes[c], dtype=getattr(torch, DTYPES[c].torch)) for c in codes}
    assert path.read_bytes() == save(theirs)


def test_same_bytes(tmp_path):
    rng, written = random.Random(0), set()
    for run in range(20):
        tensors, metadata = list(TENSORS), list(METADATA.items())
        rng.shuffle(tensors)
        rng.shuffle(metadata)
        write_safetensors(tmp_path / f"{run}", tensors, dict(metadata))
        written.add((tmp_path / f"{run}").read_bytes())
    assert len(written) == 1
    assert len(written.pop()) == safetensors_nbytes(TENSORS, METADATA)


def test_layout(tmp_path):
    path = tmp_path / "f"
    tensors = [bytes_of(code, (8, 8), key=code.lower()) for code in DTYPES]
    write_safetensors(path, tensors, METADATA)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert list(header.pop("__metadata__")) == sorted(METADATA)
    assert list(header) == sorted(header, key=lambda name: header[name]["data_offsets"])
    for tensor in tensors:
        begin = header[tensor.key]["data_offsets"][0]
        assert begin % max(1, tensor.dtype.bits // 8) == 0


dtype_and_shape = st.tuples(
    st.sampled_from(sorted(DTYPES)), st.lists(st.sampled_from([0, 1, 4, 8]), max_size=3).map(tuple)
).filter(lambda pair: DTYPES[pair[0]].nbytes(pair[1]) is not None)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.dictionaries(st.text("abc.é", max_size=5), dtype_and_shape, max_size=5),
    metadata=st.dictionaries(st.text("kü"), st.text('v"\n\\é'), max_size=4),
)
def test_written_as_the_library_reads(kinds, metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    data = {name: os.urandom(DTYPES[code].nbytes(shape)) for name, (code, shape) in kinds.items()}
    tensors = [bytes_of(*kinds[name], key=name, data=data[name]) for name in kinds]
    write_safetensors(path, tensors, metadata, overwrite=True)
    found = {
        name: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
        for name, t in deserialize(path.read_bytes())
    }
    assert found == {name: (*kinds[name], data[name]) for name in kinds}
    with safe_open(path, "numpy") as library:
        assert (library.metadata() or {}) == metadata
    ours = read_safetensors(path)
    assert ours.metadata == metadata
    assert {name: bytes(tensor.raw()) for name, tensor in ours.tensors.items()} == data


def test_many_tensors_take_the_memory_of_one(tmp_path):
    size = 4 << 20
    tensors = [
        TensorRef(f"{number}", DTYPES["U8"], (size,), lambda: bytes(size)) for number in range(12)
    ]
    assert peak_of_writing(tmp_path / "f", tensors) < 2.5 * size


def test_a_large_tensor_is_copied_in_pieces(tmp_path):
    source, size = tmp_path / "source", 100 << 20
    header = container({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    source.write_bytes(header)
    os.truncate(source, len(header) + size)
    tensors = read_safetensors(source).tensors.values()
    assert peak_of_writing(tmp_path / "f", tensors) < size / 4
    assert (tmp_path / "f").stat().st_size == safetensors_nbytes(tensors, {})


def peak_of_writing(path, tensors):
    tracemalloc.start()
    try:
        write_safetensors(path, tensors, {})
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_flushed_before_it_appears(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        made = watch(patch)
        write_safetensors(tmp_path / "f", TENSORS, METADATA)
    assert max(i for i, name in enumerate(made) if name == "write") < made.index("fsync")
    assert made.index("fsync") < made.index("rename")
    assert made[made.index("rename") :].count("fsync") == 1, "the folder is flushed afterwards"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o000, 0o077])
def test_permissions(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "new", TENSORS, {})
        (tmp_path / "old").touch()
        os.chmod(tmp_path / "old", 0o664)
        write_safetensors(tmp_path / "old", TENSORS, {}, overwrite=True)
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o666 & ~umask
    assert (tmp_path / "old").stat().st_mode & 0o7777 == 0o664


def test_link_is_followed(tmp_path):
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real").write_bytes(b"old")
    write_safetensors(tmp_path / "link", TENSORS, {}, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert set(read_safetensors(tmp_path / "real").tensors) == set("abc")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_onto_its_own_input(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(container(SOUND, VALUES))
    opened = read_safetensors(path)
    write_safetensors(path, opened.tensors.values(), {"k": "v"}, overwrite=True)
    again = read_safetensors(path)
    assert again.metadata == {"k": "v"}
    for name, tensor in opened.tensors.items():
        assert again.tensors[name].raw() == tensor.raw()


def test_existing_output(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(OutputExistsError):
        write_safetensors(tmp_path / "f", TENSORS, {})
    assert (tmp_path / "f").read_bytes() == b"old"


@pytest.mark.parametrize("old", [None, b"old"])
def test_every_failing_call(old, tmp_path, monkeypatch):
    path, failed = tmp_path / "f", []

    def reset():
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)

    def write():
        write_safetensors(path, TENSORS, METADATA, overwrite=True)

    reset()
    for name, error in each_failure(monkeypatch, write):
        assert isinstance(error, OutputError)
        assert "No space left" in str(error)
        replaced = "in place" in str(error)
        assert replaced == ("replace" in failed)
        if replaced:
            assert len(path.read_bytes()) == safetensors_nbytes(TENSORS, METADATA)
        else:
            assert (path.read_bytes() if path.exists() else None) == old
        assert os.listdir(tmp_path) == (["f"] if replaced or old is not None else [])
        reset()
        failed.append(name)
    assert {"write", "fsync", "replace", "chmod", "open"} <= set(failed)
    assert failed.count("write") == 1 + len(TENSORS)


def test_short_writes(tmp_path, monkeypatch):
    original = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, data[:7]))
    write_safetensors(tmp_path / "f", TENSORS, METADATA)
    for tensor in TENSORS:
        assert read_safetensors(tmp_path / "f").tensors[tensor.key].raw() == bytes(tensor.raw())


BAD_TENSORS = {
    "same name": ([bytes_of("U8", (1,)), bytes_of("U8", (2,))], "case"),
    "names differ by case": ([bytes_of("U8", (1,), "a.B"), bytes_of("U8", (2,), "a.b")], "case"),
    "reserved name": ([bytes_of("U8", (1,), "__metadata__")], "reserved"),
    "control character": ([bytes_of("U8", (1,), "a\x1b")], "control"),
    "lone surrogate": ([bytes_of("U8", (1,), "a\udc80")], "control"),
    "long name": ([bytes_of("U8", (1,), "n" * 513)], "long"),
    "half a byte": ([bytes_of("F4", (3,))], "whole bytes"),
    "too few bytes": ([bytes_of("F32", (3,), data=bytes(11))], "other bytes"),
    "too many bytes": ([bytes_of("F32", (3,), data=bytes(13))], "other bytes"),
}


@pytest.mark.parametrize("defect", BAD_TENSORS)
def test_bad_tensors(defect, tmp_path):
    tensors, word = BAD_TENSORS[defect]
    with pytest.raises(AdapterError, match=word):
        write_safetensors(tmp_path / "f", tensors, {})
    assert os.listdir(tmp_path) == []


def test_bad_metadata(tmp_path):
    with pytest.raises(AdapterError, match="surrogate"):
        write_safetensors(tmp_path / "f", TENSORS, {"k": "\udc80"})
    assert os.listdir(tmp_path) == []


def test_written_file_is_checked(tmp_path, monkeypatch):
    """A disk that stores other bytes than it was given."""
    original = os.write

    def write(descriptor, data):
        return original(descriptor, re.sub(rb'"a"', b'"z"', bytes(data)))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OutputError, match="lost a tensor"):
        write_safetensors(tmp_path / "f", TENSORS, {})
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, bytes(len(data))))
    with pytest.raises(OutputError, match="read back"):
        write_safetensors(tmp_path / "f", TENSORS, {})
    assert os.listdir(tmp_path) == []
