"""The folder that fusing writes: shards, headers, index, configuration and all other files."""

import json
import os
import struct

import fuse_cases as cases
import numpy as np
import pytest
import rounding
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from loratools.cli import cli
from loratools_formats.errors import AdapterError, OptionError, UnsupportedError

UP = "model.layers.{}.mlp.up_proj"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def matrix(seed, *shape, kind="f4"):
    return np.random.default_rng(seed).standard_normal(shape).astype(kind)


@pytest.fixture
def sharded(tmp_path):
    """A base of three shards: one touched, one half, one not; and files of all kinds beside it."""
    shards = {
        "model-00001-of-00003.safetensors": {
            EMBED: matrix(1, 40, 16), f"{UP.format(0)}.weight": matrix(2, 24, 16),
        },
        "model-00002-of-00003.safetensors": {f"{UP.format(1)}.weight": matrix(3, 24, 16)},
        "model-00003-of-00003.safetensors": {
            "model.norm.weight": matrix(4, 16), "steps": np.arange(3), HEAD: matrix(5, 40, 16),
        },
    }  # fmt: skip
    base = cases.base(tmp_path / "base", shards, vocab_size=40, tie_word_embeddings=False)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "README.md"):
        (base / name).write_text(f"the {name}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    return base


@pytest.fixture
def ups(tmp_path):
    rng = np.random.default_rng(6)
    return cases.adapter(
        tmp_path / "ups", {UP.format(i): cases.factors(rng, 24, 16, 2) for i in range(2)}
    )


def header(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[: 8 + length], json.loads(data[8 : 8 + length])


def names_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            found[file.name] = sorted(opened.keys())
    return found


def test_shards_are_those_of_the_base_and_untouched_bytes_its_bytes(sharded, ups, tmp_path):
    before = cases.tensors(sharded)
    result, after = cases.fused(tmp_path / "out", sharded, ups)
    assert names_in(tmp_path / "out") == names_in(sharded)
    for file in sharded.glob("*.safetensors"):
        assert header(tmp_path / "out" / file.name)[0] == header(file)[0]
    untouched = tmp_path / "out" / "model-00003-of-00003.safetensors"
    assert untouched.read_bytes() == (sharded / untouched.name).read_bytes()
    assert before[EMBED].tobytes() == after[EMBED].tobytes()
    assert [report.key for report in result.tensors] == [f"{UP.format(i)}.weight" for i in (0, 1)]
    assert (result.copied, result.left_out) == (4, ())
    index = json.loads((tmp_path / "out" / cases.INDEX).read_text())
    assert index["weight_map"] == json.loads((sharded / cases.INDEX).read_text())["weight_map"]
    assert index["metadata"] == {"x": 1, "total_size": sum(a.nbytes for a in after.values())}


def test_a_header_of_odd_order_and_padding_is_used_again(ups, tmp_path):
    """Keys out of order, spaces at its end, metadata of its own: the bytes stay."""
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
    assert (
        header(tmp_path / "out" / "model.safetensors")[0] == header(base / "model.safetensors")[0]
    )
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
        assert header(tmp_path / "out" / name)[1]["__metadata__"] == {"format": "pt"}
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


TIED = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "vocab_size": 40}


def tied(folder, **config):
    tensors = {EMBED: matrix(1, 40, 16), f"{UP.format(0)}.weight": matrix(2, 24, 16)}
    return cases.base(folder, tensors, **TIED | config)


def test_a_change_of_the_head_unties_it(tmp_path):
    rng = np.random.default_rng(1)
    base = tied(tmp_path / "base", text_config={"tie_word_embeddings": True})
    b, a = cases.factors(rng, 40, 16, 2)
    adapter = cases.adapter(tmp_path / "adapter", {"lm_head": (b, a)})
    result, after = cases.fused(tmp_path / "out", base, adapter)
    np.testing.assert_array_equal(after[EMBED], matrix(1, 40, 16))
    rounding.assert_rounded_once(after[HEAD], cases.exact(after[EMBED], b, a, 1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == {"tie_word_embeddings": False}
    assert any("were tied" in note for note in result.notes)


def test_one_adapter_on_both_tied_weights_and_one_on_the_head(tmp_path):
    """An embedding is replaced for both by one, its head changed by the other: refused."""
    rng = np.random.default_rng(1)
    base = tied(tmp_path / "base")
    head = cases.adapter(tmp_path / "head", {"lm_head": cases.factors(rng, 40, 16, 2)})
    whole = cases.adapter(
        tmp_path / "whole", {UP.format(0): cases.factors(rng, 24, 16, 2)},
        {EMBED: matrix(9, 43, 16)},
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="one after the other"):
        cases.fusion(base, head, whole)


def saved_vocabulary(folder, rows, *, head=True):
    extra = {EMBED: matrix(7, rows, 16)} | ({HEAD: matrix(8, rows, 16)} if head else {})
    rng = np.random.default_rng(2)
    return cases.adapter(folder, {UP.format(0): cases.factors(rng, 24, 16, 2)}, extra)


@pytest.mark.parametrize("rows", [43, 38])
def test_a_vocabulary_of_another_size(sharded, tmp_path, rows):
    result, after = cases.fused(
        tmp_path / "out", sharded, saved_vocabulary(tmp_path / "adapter", rows)
    )
    for key, seed in ((EMBED, 7), (HEAD, 8)):
        np.testing.assert_array_equal(after[key], matrix(seed, rows, 16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows
    assert f"the vocabulary has {rows} entries now, 40 before" in result.notes
    assert names_in(tmp_path / "out") == names_in(sharded)
    reports = {report.key: report for report in result.tensors}
    old = np.zeros((max(rows, 40), 16))
    new = old.copy()
    old[:40], new[:rows] = matrix(1, 40, 16), matrix(7, rows, 16)
    change = np.linalg.norm((new - old)[:rows]) / np.linalg.norm(old[:rows])
    assert reports[EMBED].relative_change == pytest.approx(change, rel=1e-9)


def test_half_a_vocabulary_is_refused(sharded, tmp_path):
    with pytest.raises(AdapterError, match=r"resized, but not this tensor.*lm_head"):
        cases.fusion(sharded, saved_vocabulary(tmp_path / "adapter", 43, head=False))


def test_replacements_go_in_whole_and_in_the_type_of_the_base(tmp_path):
    rng = np.random.default_rng(3)
    kind = rounding.TYPES["bf16"]
    tensors = {
        f"{UP.format(0)}.weight": matrix(2, 24, 16, kind=kind),
        "model.norm.weight": matrix(3, 16, kind=kind),
        f"{UP.format(0)}.bias": matrix(4, 24, kind=kind),
    }
    base = cases.base(tmp_path / "base", tensors)
    extra = {"model.norm.weight": matrix(5, 16), f"{UP.format(0)}.bias": matrix(6, 24)}
    adapter = cases.adapter(
        tmp_path / "adapter", {UP.format(0): cases.factors(rng, 24, 16, 2)}, extra,
        bias="all", modules_to_save=["norm"],
    )  # fmt: skip
    result, after = cases.fused(tmp_path / "out", base, adapter)
    for key, values in extra.items():
        assert after[key].dtype == kind
        rounding.assert_rounded_once(after[key], values.astype(np.float64), unequal=0)
    reports = {report.key: report for report in result.tensors}
    old = tensors["model.norm.weight"].astype(np.float64)
    change = np.linalg.norm(matrix(5, 16) - old) / np.linalg.norm(old)
    assert reports["model.norm.weight"].relative_change == pytest.approx(change, rel=1e-9)
    with pytest.raises(UnsupportedError, match="cannot be weighted or taken out"):
        cases.fusion(base, (adapter, -1.0))


@pytest.mark.parametrize("same", [False, True])
def test_two_adapters_that_replace_one_tensor(sharded, tmp_path, same):
    rng = np.random.default_rng(3)
    made = [
        cases.adapter(
            tmp_path / f"a{i}",
            {UP.format(i): cases.factors(rng, 24, 16, 2)},
            {"model.norm.weight": matrix(5 if same else 5 + i, 16)},
            modules_to_save=["norm"],
        )
        for i in range(2)
    ]
    if same:
        _, after = cases.fused(tmp_path / "out", sharded, *made)
        np.testing.assert_array_equal(after["model.norm.weight"], matrix(5, 16))
    else:
        with pytest.raises(AdapterError, match="replace the same tensor by different ones"):
            cases.fusion(sharded, *made)


def test_token_rows(sharded, tmp_path):
    rng = np.random.default_rng(3)
    rows = matrix(9, 2, 16)
    adapter = cases.adapter(
        tmp_path / "a", {UP.format(0): cases.factors(rng, 24, 16, 2)},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
        trainable_token_indices=[39, 4],
    )  # fmt: skip
    _, after = cases.fused(tmp_path / "out", sharded, adapter)
    wanted = matrix(1, 40, 16)
    wanted[[39, 4]] = rows
    np.testing.assert_array_equal(after[EMBED], wanted)


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
    size = sum(file.stat().st_size for file in sharded.glob("*.safetensors"))
    planned = json.loads(invoke(sharded, ups, "--dry-run", "--json", "-q").stdout)
    assert planned["schema"] == 1
    assert planned["dry_run"] is True
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
    assert report["bytes_out"] == sum(p.stat().st_size for p in sharded.glob("*.safetensors"))
    assert report["copied"] == 4
    assert report["left_out"] == []
    assert {row["key"]: row["modules"] for row in report["tensors"]} == {
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
