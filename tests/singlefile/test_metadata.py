"""What files say about themselves stays, and stays true."""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import GOLDEN, PEFT, DialectFile, kohya_sd15, save

from loratools.cli import cli
from loratools_formats import read_adapter


def run(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def digests(path):
    """Return the digests as sd-scripts computes them, by the safetensors library."""
    from safetensors.numpy import load_file
    from safetensors.numpy import save as serialised

    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:start])["__metadata__"]
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole = io.BytesIO(serialised(load_file(path), training))
    whole.seek(0x100000)
    return {
        "sshs_model_hash": hashlib.sha256(data[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(whole.read(0x10000)).hexdigest()[:8],
        "modelspec.hash_sha256": "0x" + hashlib.sha256(data[start:]).hexdigest(),
    }


def with_digests(path, *, size):
    file = DialectFile("kohya", {"kohya"}, seed=1)
    name = "lora_unet_mid_block_attentions_0_proj_in"
    file.tensors = {
        f"{name}.lora_down.weight": file.draw(8, size),
        f"{name}.lora_up.weight": file.draw(size, 8),
        f"{name}.alpha": np.array(4.0, np.float32),
    }
    file.metadata = kohya_sd15().metadata | {
        "ss_network_dim": "8",
        "ss_network_alpha": "4.0",
        "sshs_model_hash": "stale",
        "sshs_legacy_hash": "stalestl",
        "modelspec.hash_sha256": "stale",
        "modelspec.merged_from": "one, two",
    }
    return save(file, path)


@pytest.mark.parametrize("size", [16, 100_000], ids=["small", "beyond a megabyte"])
def test_digests_are_computed_again(tmp_path, size):
    source = with_digests(tmp_path / "in.safetensors", size=size)
    for name, arguments in {
        "copy": ("convert", source, tmp_path / "copy.safetensors"),
        "smaller": ("squeeze", source, "-o", tmp_path / "smaller.safetensors", "--rank", "4"),
    }.items():
        run(*arguments)
        path = tmp_path / f"{name}.safetensors"
        metadata = read_adapter(path).metadata
        expected = digests(path)
        assert {key: metadata[key] for key in expected} == expected
    # The digest of nothing, where the window lies beyond the end of the file.
    is_empty = expected["sshs_legacy_hash"] == "e3b0c442"
    assert is_empty == (size == 16)


def test_ranks_and_alphas_are_brought_up_to_date_and_all_else_kept(tmp_path):
    source, out = GOLDEN / "kohya_sd15.safetensors", tmp_path / "out.safetensors"
    before = read_adapter(source).metadata
    run("squeeze", source, "-o", out, "--rank", "2")
    after = read_adapter(out).metadata
    changed = {key: after[key] for key in before if after[key] != before[key]}
    assert changed == {"ss_network_dim": "2", "ss_network_alpha": "2"}
    run("squeeze", source, "-o", out, "--energy", "0.6", "--overwrite")
    ranks = {delta.rank for delta in read_adapter(out).modules.values()}
    assert len(ranks) > 1
    assert read_adapter(out).metadata["ss_network_dim"] == "Dynamic"


def test_training_data_can_be_left_out(tmp_path):
    source, out = GOLDEN / "kohya_sd15.safetensors", tmp_path / "out.safetensors"
    run("convert", source, out, "--strip-training-metadata")
    before, after = read_adapter(source), read_adapter(out)
    kept = {key for key in after.metadata if not key.startswith("loratools.")}
    assert set(before.metadata) - kept == {"ss_tag_frequency"}
    assert "private name" not in out.read_bytes().decode("latin-1")
    assert {t.key: bytes(t.raw()) for t in after.tensors()} == {
        t.key: bytes(t.raw()) for t in before.tensors()
    }


def test_a_merge_names_its_sources(tmp_path):
    source, out = GOLDEN / "kohya_sd15.safetensors", tmp_path / "out.safetensors"
    run("merge", f"{source}:0.5", f"{source}:0.5", "-o", out)
    assert read_adapter(out).metadata["modelspec.merged_from"] == "small, small"


def test_info_says_which_dialect_it_is_and_why():
    shown = run("info", GOLDEN / "mixture.safetensors")
    assert "kohya (3 keys): prefix lora_unet_ or lora_te_, flat path" in shown
    assert "diffusers (2 keys): component before a dotted path" in shown
    told = json.loads(run("info", GOLDEN / "comfyui.safetensors", "--json"))
    assert [d["name"] for d in told["dialects"]] == ["ComfyUI"]
    assert told["additions"][0]["target"] == "diffusion_model.double_blocks.0.img_mlp.0.bias"


def test_a_key_that_no_rule_claims_is_named_or_carried(tmp_path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(GOLDEN / "kohya_sd15.safetensors")
    stranger = "lora_unet_down_blocks_0.lora_gate"
    save_file(tensors | {stranger: np.ones(3, np.float32)}, tmp_path / "in.safetensors")
    done = CliRunner().invoke(cli, ["info", str(tmp_path / "in.safetensors")])
    assert stranger in str(done.exception)
    assert "`carry_unknown=True`" in str(done.exception)
    out = tmp_path / "out.safetensors"
    run("squeeze", tmp_path / "in.safetensors", "-o", out, "--rank", "1", "--carry-unknown")
    adapter = read_adapter(out, carry_unknown=True)
    assert list(adapter.carried) == [stranger]
    assert np.array_equal(adapter.carried[stranger].load(), np.ones(3))
    shown = run("info", out, "--carry-unknown")
    assert stranger in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x.lora_A.weight": None}, "do not make one kind"),
        ({"x.alpha": np.array([1.0, 2.0], np.float32)}, "alpha is not one number"),
        ({"x.alpha": np.array(np.nan, np.float32)}, "alpha is not finite"),
        ({"x.lora_A.weight": np.ones((4, 6), np.int32)}, "floating-point"),
        ({"x.lora_A.weight": np.ones((3, 6), np.float32)}, "do not fit together"),
        ({"x.lora_B.weight": np.ones((8, 4, 3, 3), np.float32)}, "numbers of dimensions"),
        ({"x.lora_mid.weight": np.ones((4, 3, 3, 3), np.float32)}, "of kind tucker"),
        ({"x.lora_down.weight": np.ones((4, 6), np.float32)}, "same part"),
        ({"x.dora_scale": np.ones(7, np.float32)}, "magnitude does not fit"),
        ({"x.scalar": np.ones(1, np.float32)}, "not supported"),
        ({"x.oft_blocks": np.ones((2, 3, 3), np.float32)}, "do not make one kind"),
        ({"y.oft_blocks": np.ones((3, 3), np.float32)}, "no stack of blocks"),
        ({"x.hada_w1_a": np.ones((8, 2), np.float32)}, "do not make one kind"),
        ({"y.hada_w1_a": np.ones((8, 2), np.float32)}, "lacks w1_b, w2_a, w2_b"),
        ({"y.lokr_w1": np.ones((8, 2), np.float32)}, "neither or both of w2"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, changes, words):
    from safetensors.numpy import save_file

    tensors = {
        "x.lora_A.weight": np.ones((4, 6), np.float32),
        "x.lora_B.weight": np.ones((8, 4), np.float32),
    } | changes
    path = tmp_path / "in.safetensors"
    save_file({f"unet.{k}": t for k, t in tensors.items() if t is not None}, path)
    done = CliRunner().invoke(cli, ["info", str(path)])
    assert words in str(done.exception)
    assert "unet." in str(done.exception)


def test_info_counts_and_names_targets_as_one_says_it(tmp_path):
    file = DialectFile("diffusers", {"diffusers"}, seed=2)
    file.pair("transformer.transformer_blocks.0.attn.to_out.0", 8, 8, 2, PEFT, alpha=2.0)
    output = run("info", save(file, tmp_path / "one.safetensors"))
    assert "diffusers (2 keys)" in output
    assert "(1 key)" in output
    assert "(1 tensor)" in output
    assert "\ntargets     to_out.0\n" in output
