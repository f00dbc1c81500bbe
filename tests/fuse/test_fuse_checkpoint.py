"""The folder that fusing writes: shards, headers, index, configuration and all other files."""

import json
import os
import struct
from hashlib import sha256

import fuse_cases as cases
import numpy as np
import pytest
import rounding
from click.testing import CliRunner
from fuse_cases import EMBED, UP, matrix, names_in
from safetensors.numpy import save_file

from loratools.cli import cli
from loratools_formats.disk.errors import AdapterError, OptionError


def header(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[: 8 + length], json.loads(data[8 : 8 + length])


def test_shards_are_those_of_the_base_and_untouched_bytes_its_bytes(sharded, ups, tmp_path):
    before = cases.tensors(sharded)
    result, after = cases.fused(tmp_path / "out", sharded, ups)
    assert names_in(tmp_path / "out") == names_in(sharded)
    for file in sharded.glob("*.safetensors"):
        ours, theirs = header(tmp_path / "out" / file.name)[1], header(file)[1]
        metadata = ours.pop("__metadata__")
        assert theirs.pop("__metadata__").items() <= metadata.items()
        assert ours == theirs
        is_rewritten = file.name != "model-00003-of-00003.safetensors"
        assert ("loratools.operation" in metadata) == is_rewritten
    untouched = tmp_path / "out" / "model-00003-of-00003.safetensors"
    assert untouched.read_bytes() == (sharded / untouched.name).read_bytes()
    assert before[EMBED].tobytes() == after[EMBED].tobytes()
    assert [report.key for report in result.tensors] == [f"{UP.format(i)}.weight" for i in (0, 1)]
    assert (result.copied, result.left_out) == (4, ())
    index = json.loads((tmp_path / "out" / cases.INDEX).read_text())
    assert index["weight_map"] == json.loads((sharded / cases.INDEX).read_text())["weight_map"]
    assert index["metadata"] == {"x": 1, "total_size": sum(a.nbytes for a in after.values())}


def test_a_header_of_odd_order_and_padding_is_read_and_its_metadata_stay(ups, tmp_path):
    """Keys out of order, spaces at its end, metadata of its own, beside those of the operation."""
    base = cases.base(tmp_path / "base", {"x": matrix(1, 1)})
    one, other = matrix(2, 24, 16), matrix(3, 24, 16)
    entries = {
        "__metadata__": {"made": "by hand", "format": "pt"},
        f"{UP.format(1)}.weight": {
            "dtype": "F32", "shape": [24, 16], "data_offsets": [one.nbytes, 2 * one.nbytes]
        },
        f"{UP.format(0)}.weight": {
            "dtype": "F32", "shape": [24, 16], "data_offsets": [0, one.nbytes]
        },
    }  # fmt: skip
    text = json.dumps(entries, indent=1).encode() + b" " * 33
    data = struct.pack("<Q", len(text)) + text + one.tobytes() + other.tobytes()
    (base / "model.safetensors").write_bytes(data)
    _, after = cases.fused(tmp_path / "out", base, ups)
    metadata = header(tmp_path / "out" / "model.safetensors")[1]["__metadata__"]
    assert entries["__metadata__"].items() <= metadata.items()
    assert list(metadata) == sorted(metadata)
    assert metadata["loratools.operation"] == "fuse"
    assert json.loads(metadata["loratools.options"])["weights"] == [1.0]
    recorded = json.loads(metadata["loratools.inputs"])
    file = ups / "adapter_model.safetensors"
    assert recorded["adapter 1/adapter_model.safetensors"] == sha256(file.read_bytes()).hexdigest()
    theirs = sha256((base / "model.safetensors").read_bytes()).hexdigest()
    assert recorded["base/model.safetensors"] == theirs
    assert not np.array_equal(after[f"{UP.format(0)}.weight"], one)


def test_other_files_are_carried_and_stale_weights_are_not(sharded, ups, tmp_path):
    save_file({"old": matrix(1, 2)}, sharded / "consolidated.safetensors")
    (sharded / "pytorch_model.bin").write_text("old")
    (sharded / "pytorch_model.bin.index.json").write_text("{}")
    (sharded / "1_Pooling" / "old.ckpt").write_text("old")
    (sharded / ".cache").mkdir()
    (sharded / ".cache" / "x").write_text("x")
    (sharded / ".gitattributes").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (sharded / "linked").symlink_to("../elsewhere")
    (sharded / "license").symlink_to("README.md")
    result, _ = cases.fused(tmp_path / "out", sharded, ups)
    stale = ["consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    assert result.left_out == (".cache", "1_Pooling/old.ckpt", *stale[:1], "linked", *stale[1:])
    out = tmp_path / "out"
    assert {str(p.relative_to(out)) for p in out.rglob("*")} == {
        *names_in(sharded), cases.INDEX, "config.json", "tokenizer.json", "generation_config.json",
        "chat_template.jinja", "README.md", "1_Pooling", "1_Pooling/config.json", ".gitattributes",
        "license", "provenance.json",
    } - {"consolidated.safetensors"}  # fmt: skip
    for name in ("tokenizer.json", "README.md", "config.json", "1_Pooling/config.json"):
        assert (out / name).read_bytes() == (sharded / name).read_bytes()
    assert not (out / "license").is_symlink()


def test_a_folder_that_cannot_be_listed_is_not_passed_over(sharded, ups, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuses(path):
        if os.path.basename(path) == "1_Pooling":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(AdapterError, match=r"1_Pooling: folder cannot be listed"):
        cases.fused(tmp_path / "out", sharded, ups)
    assert not (tmp_path / "out").exists()


def test_provenance_says_how_it_was_made(sharded, ups, tmp_path):
    cases.fused(tmp_path / "out", sharded, (ups, -0.5))
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    text = json.dumps(record)
    assert '"fuse"' in text
    assert "-0.5" in text
    assert str(tmp_path) not in text, "a path of this machine"


def test_a_base_with_a_cache_of_the_hub(sharded, ups, tmp_path):
    """Its files are links to blobs of the same repository."""
    root = tmp_path / "models--a--b"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in sharded.iterdir() if p.is_file())):
        (root / "blobs" / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    cases.fused(tmp_path / "out", snapshot, ups)
    cases.fused(tmp_path / "direct", sharded, ups)
    for file in (tmp_path / "out").glob("model*"):
        assert not file.is_symlink()
        assert file.read_bytes() == (tmp_path / "direct" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_a_lone_shard_keeps_what_it_needs_to_be_found(ups, tmp_path, name):
    tensors = {f"{UP.format(i)}.weight": matrix(i, 24, 16) for i in range(2)}
    base = cases.base(tmp_path / "base", {name: tensors})
    cases.fused(tmp_path / "out", base, ups)
    assert names_in(tmp_path / "out") == {name: sorted(tensors)}
    is_plain = name == "model.safetensors"
    assert (tmp_path / "out" / cases.INDEX).exists() != is_plain
    if not is_plain:
        listed = json.loads((tmp_path / "out" / cases.INDEX).read_text())["weight_map"]
        assert listed == dict.fromkeys(tensors, name)


@pytest.mark.parametrize(("limit", "count"), [(1, 6), (3000, 4), (6000, 2), (10**9, 1)])
def test_shards_are_filled_up_to_a_size_in_the_order_of_the_base(
    sharded, ups, tmp_path, limit, count
):
    result, after = cases.fused(tmp_path / "out", sharded, ups, max_shard_bytes=limit)
    _, same = cases.fused(tmp_path / "same", sharded, ups)
    found = names_in(tmp_path / "out")
    assert tuple(sorted(found)) == result.shards
    assert len(found) == count
    if count == 1:
        assert list(found) == ["model.safetensors"]
        assert not (tmp_path / "out" / cases.INDEX).exists()
    else:
        assert list(found) == [
            f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        listed = json.loads((tmp_path / "out" / cases.INDEX).read_text())["weight_map"]
        assert listed == {key: name for name, keys in found.items() for key in keys}
    for name, keys in found.items():
        size = sum(after[key].nbytes for key in keys)
        assert size <= limit or len(keys) == 1
        metadata = header(tmp_path / "out" / name)[1]["__metadata__"]
        assert (metadata["format"], metadata["loratools.operation"]) == ("pt", "fuse")
    assert after.keys() == same.keys()
    assert all(after[key].tobytes() == same[key].tobytes() for key in after)


def test_a_single_file_cannot_be_split(sharded, ups, tmp_path):
    tensors = {f"{UP.format(i)}.weight": matrix(i, 24, 16) for i in range(2)}
    base = cases.base(tmp_path / "one", tensors)
    with pytest.raises(OptionError, match="cannot be split"):
        cases.fusion(base / "model.safetensors", ups, max_shard_bytes=100)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_in_the_config_follows(ups, tmp_path, key, nested):
    tensors = {f"{UP.format(i)}.weight": matrix(i, 24, 16) for i in range(2)}
    config = {key: "float32", "other": [1, {"a": None}]}
    config |= {"text_config": {key: "float32", "kept": 2}} if nested else {}
    base = cases.base(tmp_path / "base", tensors | {"steps": np.arange(2)}, **config)
    result, after = cases.fused(tmp_path / "out", base, ups, dtype="bf16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = {"model_type": "llama"} | config | {key: "bfloat16"}
    if nested:
        wanted["text_config"] = {key: "bfloat16", "kept": 2}
    assert written == wanted
    assert {str(array.dtype) for array in after.values()} == {"bfloat16", "int64"}
    assert (len(result.tensors), result.copied) == (2, 1)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_tensors_of_no_or_one_element_are_converted(ups, tmp_path, dtype):
    tensors = {f"{UP.format(i)}.weight": matrix(i, 24, 16) for i in range(2)}
    odd = {"none": np.zeros((0, 4), "f4"), "scale": np.array(1.5, "f8"), "long": matrix(5, 300_001)}
    base = cases.base(tmp_path / "base", tensors | odd)
    result, after = cases.fused(tmp_path / "out", base, ups, dtype=dtype)
    for key, array in odd.items():
        assert after[key].shape == array.shape
        assert after[key].dtype == rounding.TYPES[dtype]
        rounding.assert_rounded_once(after[key], array.astype(np.float64))
    assert result.converted == (3 if dtype == "bf16" else 1)


def invoke(*arguments):
    return CliRunner().invoke(cli, ["fuse", *map(str, arguments)], catch_exceptions=False)


def test_a_dry_run_writes_nothing_and_says_what_would_change(sharded, ups, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = invoke(sharded, ups, "--dry-run", "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert f"{UP.format(0)}.weight" in done.output
    assert "24×16" in done.output
    assert "tensors: 2 of 6 change" in done.output
    assert "dry run, nothing was written" in done.output
    planned = json.loads(invoke(sharded, ups, "--dry-run", "--json", "-q").stdout)
    assert planned["schema"] == 1
    assert planned["dry_run"] is True
    assert invoke(sharded, ups, "-o", tmp_path / "out", "-q").exit_code == 0
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert planned["bytes_out"] == size
    assert [row["name"] for row in planned["tensors"]] == [f"{UP.format(i)}.weight" for i in (0, 1)]


def test_the_report_as_json(sharded, ups, tmp_path):
    done = invoke(sharded, f"{ups}:0.5", "-o", tmp_path / "out", "--json", "-q")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["schema"] == 1
    assert report["operation"] == "fuse"
    assert report["adapters"] == [{"name": "ups", "weight": 0.5}]
    assert report["files"] == sorted(names_in(sharded))
    assert report["bytes_out"] == sum(
        p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")
    )
    assert report["copied"] == 4
    assert report["left_out"] == []
    assert {row["name"]: row["modules"] for row in report["tensors"]} == {
        f"{UP.format(i)}.weight": [UP.format(i)] for i in (0, 1)
    }
    delta = np.sqrt(sum(row["delta_norm"] ** 2 for row in report["tensors"]))
    base = np.sqrt(sum(row["base_norm"] ** 2 for row in report["tensors"]))
    assert report["relative_change"] == pytest.approx(delta / base)
    for row in report["tensors"]:
        assert row["relative_change"] == pytest.approx(row["delta_norm"] / row["base_norm"])
        assert row["lost_to_rounding"] == pytest.approx(row["rounding_norm"] / row["delta_norm"])


def test_no_output_is_a_usage_error(sharded, ups):
    with pytest.raises(OptionError, match="no output given"):
        invoke(sharded, ups)


def test_permissions_follow_the_umask(sharded, ups, tmp_path):
    before = os.umask(0o027)
    try:
        cases.fused(tmp_path / "out", sharded, ups)
    finally:
        os.umask(before)
    modes = {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").glob("model*")}
    assert modes == {"0o640"}
