"""Shards written by the library, read by safetensors: what lies where, and what goes wrong."""

import json
import os
import struct
import threading
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loratools_formats.checkpoints.shard_plan import Blank, Made, Shard
from loratools_formats.checkpoints.shards import write_shards
from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError, OutputError


def made(name, array, pieces=1):
    """Return a part that is filled in pieces, last one first."""
    data = array.tobytes()
    blank = Blank(name, DTYPES["F32"], array.shape)
    cuts = [len(data) * i // pieces // 4 * 4 for i in range(pieces + 1)]

    def fill(sinks):
        for start, stop in reversed(list(pairwise(cuts))):
            sinks[name].write_at(start, data[start:stop])

    return Made((blank,), fill)


def text(name, value, most):
    blank = Blank(name, DTYPES["U8"], (most,), is_text=True)
    return Made((blank,), lambda sinks: sinks[name].write_at(0, value))


def arrays(count=6):
    rng = np.random.default_rng(0)
    return {f"t{i}": rng.standard_normal((i + 1, 5)).astype("f4") for i in range(count)}


def header(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


@pytest.mark.parametrize("workers", [1, 3])
def test_copied_and_made_tensors_of_several_shards(tmp_path, workers):
    values = arrays()
    save_file(values, tmp_path / "source")
    source = read_safetensors(tmp_path / "source")
    shards = [
        Shard("a.safetensors", [source.tensors["t3"], made("t1", values["t1"], pieces=3)]),
        Shard(
            "b.safetensors",
            [made("t0", values["t0"]), source.tensors["t5"]],
            metadata={"k": "v"},
        ),
        Shard("c.safetensors", [in_memory("t2", values["t2"])]),
    ]
    seen = []
    (tmp_path / "out").mkdir()
    write_shards(tmp_path / "out", shards, workers=workers, progress=lambda *at: seen.append(at))
    for shard, names in zip(shards, (["t1", "t3"], ["t0", "t5"], ["t2"]), strict=True):
        file = tmp_path / "out" / shard.name
        assert file.stat().st_size == shard.nbytes
        found = load_file(file)
        assert sorted(found) == names
        for name in names:
            np.testing.assert_array_equal(found[name], values[name])
    assert header(tmp_path / "out" / "b.safetensors")["__metadata__"] == {"k": "v"}
    total = sum(values[f"t{i}"].nbytes for i in (0, 1, 2, 3, 5))
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_bytes_do_not_depend_on_workers(tmp_path):
    values = arrays(20)
    found = []
    for workers in (1, 2, 7):
        folder = tmp_path / str(workers)
        folder.mkdir()
        parts = [made(name, array, pieces=2) for name, array in values.items()]
        parts += [text("z", b"{}", 10), text("a", b'{"x": 1}', 10)]
        write_shards(folder, [Shard("s.safetensors", parts)], workers=workers)
        found.append((folder / "s.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


def test_text_lies_last_and_is_as_long_as_it_is(tmp_path):
    values = arrays()
    parts = [text("m.state", b'{"a": 1}', 50), text("b.state", b"{}", 40)]
    parts += [made(name, array) for name, array in values.items()]
    shard = Shard("s.safetensors", parts)
    write_shards(tmp_path, [shard])
    found = load_file(tmp_path / "s.safetensors")
    assert found["m.state"].tobytes() == b'{"a": 1}'
    assert found["b.state"].tobytes() == b"{}"
    offsets = {k: v["data_offsets"] for k, v in header(tmp_path / "s.safetensors").items()}
    last = max(stop for name, (_, stop) in offsets.items() if name.startswith("t"))
    assert offsets["b.state"] == [last, last + 2]
    assert offsets["m.state"] == [last + 2, last + 10]
    assert (tmp_path / "s.safetensors").stat().st_size == shard.nbytes - 80
    for name, array in values.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("changed", [None, "name", "shape", "dtype", "text"])
def test_a_header_is_used_again_if_all_is_as_it_was(tmp_path, changed):
    values = arrays(2)
    entries = {
        "t1": {"dtype": "F32", "shape": [2, 5], "data_offsets": [20, 60]},
        "t0": {"dtype": "F32", "shape": [1, 5], "data_offsets": [0, 20]},
    }
    words = json.dumps(entries).encode() + b"   "
    data = struct.pack("<Q", len(words)) + words
    (tmp_path / "source").write_bytes(data + values["t0"].tobytes() + values["t1"].tobytes())
    source = read_safetensors(tmp_path / "source")
    name = "t2" if changed == "name" else "t0"
    shape = (5, 1) if changed == "shape" else (1, 5)
    dtype = DTYPES["I32" if changed == "dtype" else "F32"]
    zeros = Made((Blank(name, dtype, shape),), lambda sinks: sinks[name].write_at(0, bytes(20)))
    parts = [source.tensors["t1"], zeros] + ([text("x", b"a", 3)] if changed == "text" else [])
    write_shards(tmp_path, [Shard("s.safetensors", parts, template=source)])
    written = (tmp_path / "s.safetensors").read_bytes()
    assert written.startswith(data) == (changed is None)
    found = load_file(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(found["t1"], values["t1"])
    assert not found[name].any()
    assert found[name].shape == shape


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda sinks: None, "tensor was not filled"),
        (lambda sinks: sinks["t"].write_at(0, bytes(12)), r"not filled.*12 bytes.*16"),
        (lambda sinks: sinks["t"].write_at(8, bytes(12)), "beyond the end"),
        (lambda sinks: sinks["t"].write_at(-4, bytes(8)), "beyond the end"),
    ],
)
@pytest.mark.parametrize("workers", [1, 4])
def test_a_tensor_must_be_filled_and_no_more(tmp_path, fill, message, workers):
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else []
    parts = [Made((Blank("t", DTYPES["F32"], (4,)),), fill)]
    parts += [made(name, array) for name, array in arrays(9).items()]
    with pytest.raises(AdapterError, match=message):
        write_shards(tmp_path, [Shard("s.safetensors", parts)], workers=workers)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= len(before), "a descriptor is left open"


@pytest.mark.parametrize("value", [None, b"x" * 11])
def test_text_must_be_given_and_no_longer_than_planned(tmp_path, value):
    part = text("t", value, 10)
    if value is None:
        part = Made(part.blanks, lambda sinks: None)
    with pytest.raises(AdapterError, match=r"not filled|longer than was planned"):
        write_shards(tmp_path, [Shard("s.safetensors", [part])])


def test_names_that_clash_are_refused(tmp_path):
    part = made("t0", arrays()["t0"])
    with pytest.raises(AdapterError, match="t0"):
        write_shards(tmp_path, [Shard("s.safetensors", [part, part])])


def test_a_failure_stops_the_others(tmp_path):
    """One task fails at once, the rest would go on for long; it is the failure that is raised."""
    calls = []
    released = threading.Event()

    def slow(name):
        def fill(sinks):
            calls.append(name)
            released.wait(0.01)
            sinks[name].write_at(0, bytes(400))

        return Made((Blank(name, DTYPES["F32"], (100,)),), fill)

    def broken(_):
        raise OutputError("this one is broken", path=tmp_path)

    parts = [Made((Blank("bad", DTYPES["F32"], (1000,)),), broken)]
    parts += [slow(f"t{i:03d}") for i in range(200)]
    with pytest.raises(OutputError, match="this one is broken"):
        write_shards(tmp_path, [Shard("s.safetensors", parts)], workers=2)
    assert len(calls) < 20


@pytest.mark.parametrize("error", [18, 38, 95])
def test_copies_without_the_kernel_are_the_same(tmp_path, monkeypatch, error):
    """Across file systems, or on kernels that cannot: EXDEV, ENOSYS, EOPNOTSUPP."""
    values = arrays()
    save_file(values, tmp_path / "source")
    source = read_safetensors(tmp_path / "source")

    def fails(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "copy_file_range", fails, raising=False)
    if error == 95:
        monkeypatch.setattr(os, "posix_fallocate", fails, raising=False)
    write_shards(tmp_path, [Shard("s.safetensors", list(source.tensors.values()))])
    found = load_file(tmp_path / "s.safetensors")
    assert all(np.array_equal(found[name], values[name]) for name in values)


def test_short_copies_and_short_writes_are_continued(tmp_path, monkeypatch):
    values = arrays()
    save_file(values, tmp_path / "source")
    source = read_safetensors(tmp_path / "source")
    real, write = os.copy_file_range, os.pwrite
    monkeypatch.setattr(
        os, "copy_file_range", lambda fd, out, n, *at: real(fd, out, min(n, 3), *at)
    )
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:7], at))
    parts = [source.tensors["t4"], made("t2", values["t2"])]
    write_shards(tmp_path, [Shard("s.safetensors", parts)])
    found = load_file(tmp_path / "s.safetensors")
    assert all(np.array_equal(found[name], values[name]) for name in ("t2", "t4"))
