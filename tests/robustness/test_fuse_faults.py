"""`fuse` when things go wrong: out of space, or given a broken checkpoint.

One line on stderr, exit code 2, nothing partial, and a base that is as it was, to the nanosecond.
"""

import errno
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import faults
import numpy as np
import pytest
from fuse_bases import INDEX, adapter, content, hollow, linear, sharded, state, weights
from safetensors.numpy import load_file, save_file

from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools_formats import read_adapter
from loratools_formats.checkpoints import shards
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import OutputError

PEAK_BYTES = 150_000_000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    return sharded(root / "base", weights(6, 64)), adapter(root / "adapter", 6, 64)


@pytest.fixture
def refused(loratools, tmp_path):
    """Return a function that runs fuse and checks everything a refusal promises."""

    def check(base, source, *words, output=None, options=(), **how):
        before = state(tmp_path)
        output = tmp_path / "out" if output is None else output
        run = loratools("fuse", base, source, "-o", output, *options, **how)
        (line,) = run.remarks
        assert line.startswith("error: ")
        assert "--traceback" not in line, "an exception that is not ours"
        for word in words:
            assert word in line
        assert run.code == 2
        assert run.out == ""
        assert state(tmp_path) == before
        assert run.peak_bytes < PEAK_BYTES
        return line

    return check


@pytest.fixture
def broken(small, tmp_path):
    """Return a copy of the small base, to be broken, and its adapter."""
    return Path(shutil.copytree(small[0], tmp_path / "base")), small[1]


def shard(base, number=2):
    return base / f"model-{number:05d}-of-00003.safetensors"


def edit_index(base, change):
    index = json.loads((base / INDEX).read_text())
    change(index["weight_map"])
    (base / INDEX).write_text(json.dumps(index))


def test_a_truncated_shard(broken, refused):
    os.truncate(shard(broken[0]), shard(broken[0]).stat().st_size - 1)
    refused(*broken, "model-00002-of-00003.safetensors", "truncated")


def test_a_missing_shard(broken, refused):
    shard(broken[0]).unlink()
    refused(*broken, "model-00002-of-00003.safetensors", "is not there")


def test_a_pipe_for_a_shard(broken, refused):
    shard(broken[0]).unlink()
    os.mkfifo(shard(broken[0]))
    refused(*broken, "model-00002-of-00003.safetensors", "not a regular file")


def test_a_link_out_of_the_folder(broken, refused, tmp_path):
    os.rename(shard(broken[0]), tmp_path / "elsewhere.safetensors")
    shard(broken[0]).symlink_to("../elsewhere.safetensors")
    refused(*broken, "leads out of")


@pytest.mark.parametrize("name", ["../base/x.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_points_outside_the_folder(broken, refused, name):
    edit_index(broken[0], lambda listed: listed.update({f"{linear(0)}.weight": name}))
    refused(*broken, "index names a file outside the folder", INDEX)


def test_an_index_that_lists_more_than_there_is(broken, refused):
    edit_index(broken[0], lambda listed: listed.update({"more": shard(broken[0]).name}))
    refused(*broken, "more", "in no shard")


def test_an_index_that_lists_less_than_there_is(broken, refused):
    edit_index(broken[0], lambda listed: listed.pop(f"{linear(1)}.weight"))
    refused(*broken, linear(1), "index and shards disagree")


def test_a_shape_that_does_not_fit(broken, refused):
    tensors = load_file(shard(broken[0]))
    key = f"{linear(1)}.weight"
    save_file(tensors | {key: np.ones((64, 63), "f2")}, shard(broken[0]))
    refused(*broken, linear(1), "64", "63")


def test_a_module_that_the_base_does_not_have(broken, refused):
    tensors = load_file(shard(broken[0]))
    key = f"{linear(1)}.weight"
    tensors["model.layers.1.mlp.up_projection.weight"] = tensors.pop(key)
    save_file(tensors, shard(broken[0]))
    edit_index(
        broken[0],
        lambda listed: listed.update({"model.layers.1.mlp.up_projection.weight": listed.pop(key)}),
    )
    line = refused(*broken, "no base tensor fits 1 of the adapter's modules", linear(1))
    assert "(nearest: model.layers." in line


def test_a_base_quantised_in_an_unknown_way(broken, refused):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}
    (broken[0] / "config.json").write_text(json.dumps(config))
    tensors, name = load_file(shard(broken[0])), linear(1)
    del tensors[f"{name}.weight"]
    packed = {"W_q": ("u1", 32, 64), "scale": ("f2", 64, 1), "zero": ("f2", 64, 1)}
    parts = {f"{name}.{part}": np.ones(size, kind) for part, (kind, *size) in packed.items()}
    save_file(tensors | parts, shard(broken[0]))
    index = broken[0] / "model.safetensors.index.json"
    where = json.loads(index.read_text())
    home = where["weight_map"].pop(f"{name}.weight")
    where["weight_map"] |= dict.fromkeys(parts, home)
    index.write_text(json.dumps(where))
    refused(*broken, "hqq", "HQQ")


def test_integers_cannot_be_added_to(broken, refused):
    tensors = load_file(shard(broken[0]))
    key = f"{linear(1)}.weight"
    save_file(tensors | {key: np.ones((64, 64), "i1")}, shard(broken[0]))
    refused(*broken, key, "I8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["base", "adapter"])
def test_values_that_are_not_finite(broken, refused, tmp_path, side, value):
    base, source = broken
    if side == "base":
        file, key = shard(base), f"{linear(1)}.weight"
    else:
        source = Path(shutil.copytree(source, tmp_path / "adapter"))
        file = source / "adapter_model.safetensors"
        key = f"base_model.model.{linear(1)}.lora_A.weight"
    tensors = load_file(file)
    tensors[key][3, 5] = value
    save_file(tensors, file)
    refused(base, source, key, "NaN or infinite")


def test_a_result_that_overflows(broken, refused):
    tensors = load_file(shard(broken[0]))
    tensors[f"{linear(1)}.weight"][:] = 65504
    save_file(tensors, shard(broken[0]))
    refused(broken[0], f"{broken[1]}:1e6", ".mlp.up_proj", "does not fit F16", "--dtype")


def test_a_pipe_beside_the_shards(broken, refused):
    os.mkfifo(broken[0] / "notes")
    refused(*broken, "notes", "not a regular file")


def test_a_link_to_nothing_beside_the_shards(broken, refused):
    (broken[0] / "notes").symlink_to("nowhere")
    refused(*broken, "notes", "no such file")


def test_an_output_inside_the_base(broken, refused):
    refused(*broken, "inside the input", output=broken[0] / "out")


def test_an_output_around_the_base(broken, refused, tmp_path):
    refused(*broken, "around it", output=tmp_path, options=["--overwrite"])


def test_an_output_whose_folder_cannot_be_made(broken, refused, tmp_path):
    (tmp_path / "none").write_text("")
    refused(*broken, "does not exist", output=tmp_path / "none" / "out")


def test_an_output_that_exists(broken, refused):
    refused(*broken, "--overwrite", output=broken[0])


def test_the_base_itself_is_never_replaced(broken, loratools, tmp_path):
    before = content(broken[0])
    run = loratools("fuse", *broken, "-o", broken[0], "--overwrite")
    assert run.code == 2
    assert "inputs are never changed" in run.err
    assert content(broken[0]) == before
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_a_file_size_limit(broken, refused):
    line = refused(*broken, "File too large", limits={"RLIMIT_FSIZE": 8192})
    assert "Nothing was changed" in line


def fused(broken, out, **options):
    inputs = [FuseInput(read_adapter(broken[1]), 1.0, "adapter")]
    return Fusion(read_checkpoint(broken[0]), inputs, FuseOptions(**options)).write(out)


def test_a_flush_that_fails_meanwhile_is_not_forgotten(small, tmp_path, monkeypatch):
    """The system reports such a failure once, and the flush at the end would succeed."""
    flush, failed = os.fsync, threading.Event()

    def fsync(descriptor):
        if "(flush)" in threading.current_thread().name and not failed.is_set():
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        failed.wait(10)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shards, "_FLUSH_SECONDS", 0.0)
    with pytest.raises(OutputError, match="Input/output error"):
        fused(small, tmp_path / "out")
    assert failed.is_set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_every_call_of_the_system_may_fail(broken, tmp_path, monkeypatch, workers):
    """The first call fails, then the second ...: an error, no output, nothing left."""
    before, out = state(broken[0]), tmp_path / "out"
    seen = set()

    def action():
        shutil.rmtree(out, ignore_errors=True)
        fused(broken, out, workers=workers)

    for call, error in faults.each_failure(monkeypatch, action):
        seen.add(call)
        if error is None:
            assert call == "mkdir", "only of a folder that is there already"
        elif out.exists():
            assert "the output is in place" in str(error)
        else:
            assert os.listdir(tmp_path) == ["base"], call
    assert seen >= {"open", "fsync", "mkdir", "rename"}
    assert state(broken[0]) == before
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "copy_file_range", "ftruncate"])
def test_a_full_disk_while_shards_are_written(broken, tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(28, os.strerror(28))

    if call == "ftruncate":  # where space cannot be taken in advance
        monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OutputError, match=r"No space left.*Nothing was changed"):
        fused(broken, tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


def test_too_little_space_is_refused_before_the_first_write(broken, tmp_path, monkeypatch):
    """Space is needed for the weights and for the files beside them."""
    (broken[0] / "large").write_bytes(b"x" * 100_000)
    fused(broken, tmp_path / "first")
    made = [path for path in (tmp_path / "first").iterdir() if path.name != "provenance.json"]
    wanted = sum(path.stat().st_size for path in made)
    real = os.statvfs(tmp_path)

    def statvfs(free):
        values = list(real)
        values[0] = values[1] = 1  # f_bsize, f_frsize
        values[4] = free  # f_bavail
        return lambda _: os.statvfs_result(values)

    index = (tmp_path / "first" / INDEX).stat().st_size
    monkeypatch.setattr(os, "mkdir", None)
    monkeypatch.setattr(os, "statvfs", statvfs(wanted - index - 1))
    with pytest.raises(OutputError, match="not enough space"):
        fused(broken, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(os, "statvfs", statvfs(wanted))
    fused(broken, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(small, loratools, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = loratools("fuse", *small, "-o", disk / "out")
        assert run.code == 2
        assert "not enough space" in run.err
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("workers", ["1", "4"])
def test_a_shard_truncated_while_it_is_read(broken, tmp_path, workers):
    inputs = [FuseInput(read_adapter(broken[1]), 1.0, "adapter")]
    fusion = Fusion(read_checkpoint(broken[0]), inputs, FuseOptions(workers=int(workers)))
    os.truncate(shard(broken[0]), 2000)
    with pytest.raises(Exception, match="ended while it was being read"):
        fusion.write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


def test_a_shard_changed_while_it_is_read(broken, tmp_path):
    inputs = [FuseInput(read_adapter(broken[1]), 1.0, "adapter")]
    fusion = Fusion(read_checkpoint(broken[0]), inputs, FuseOptions())
    os.utime(shard(broken[0]), ns=(1, 1))
    with pytest.raises(Exception, match="changed while it was being read"):
        fusion.write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


def test_memory_does_not_grow_with_the_checkpoint(loratools, tmp_path):
    """64 MB and 512 MB, every weight changed."""
    peaks = []
    for layers in (8, 64):
        base = hollow(tmp_path / f"base{layers}", layers, 2000)
        source = adapter(tmp_path / f"adapter{layers}", layers, 2000)
        run = loratools("fuse", base, source, "-o", tmp_path / "out", "-q")
        assert run.code == 0, run.err
        shutil.rmtree(tmp_path / "out")
        peaks.append(run.peak_bytes)
    assert max(peaks) < PEAK_BYTES
    assert peaks[1] - peaks[0] < 15_000_000
