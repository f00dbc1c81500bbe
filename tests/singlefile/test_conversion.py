"""What a conversion refuses, declares, measures and carries along, whatever the names."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import KOHYA, PEFT, DialectFile, save
from safetensors.numpy import save_file
from test_dialects import tensors_of
from test_resolution import deltas, refusal, run

from loratools.cli import cli
from loratools.naming.tables import flattened
from loratools_formats import read_adapter


@pytest.mark.parametrize(
    ("leaf", "value", "target"),
    [
        ("img_attn_proj.lora_down.weight", np.inf, "diffusers"),
        ("img_attn_qkv.lora_up.weight", np.nan, "diffusers"),  # taken apart: its rank is measured
        ("img_attn_qkv.lora_down.weight", np.inf, "comfyui"),
        ("txt_attn_proj.dora_scale", np.inf, "comfyui"),
        ("img_mlp_0.hada_w1_a", np.inf, "kohya"),
    ],
)
def test_infinities_are_refused_by_one_line_with_the_files_key(tmp_path, leaf, value, target):
    """A process of its own shows what NumPy warns of, too."""
    file, block = DialectFile("kohya", {"kohya"}, seed=12), "lora_unet_double_blocks_0_"
    file.pair(f"{block}img_attn_proj", 16, 16, 4, KOHYA, alpha=4.0)
    file.pair(f"{block}img_attn_qkv", 48, 16, 4, KOHYA, alpha=3.0)
    if target != "diffusers":
        file.pair(f"{block}txt_attn_proj", 16, 16, 4, KOHYA, alpha=4.0)
        file.tensors[f"{block}txt_attn_proj.dora_scale"] = np.ones((16, 1), np.float32)
        for end, shape in (
            ("w1_a", (64, 2)),
            ("w1_b", (2, 16)),
            ("w2_a", (64, 2)),
            ("w2_b", (2, 16)),
        ):
            file.tensors[f"{block}img_mlp_0.hada_{end}"] = file.draw(*shape)
    file.tensors = {key: tensor.astype(np.float32) for key, tensor in file.tensors.items()}
    file.tensors[block + leaf].flat[3] = value
    source, output = save(file, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    command = [sys.executable, "-c", "from loratools.cli import main; main()", "convert"]
    arguments = [source, output, "--to", target]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "NaN or infinite values" in line
    assert f"tensor {block}{leaf}" in line
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("lost", ["txt_attn_proj", "img_attn_qkv"])
def test_doras_of_inputs_are_a_loss_to_diffusers(tmp_path, lost):
    """Also where the module would have to come apart, which such a DoRA cannot."""
    file, block = DialectFile("kohya", {"kohya"}, seed=9), "lora_unet_double_blocks_0_"
    file.pair(f"{block}img_attn_proj", 16, 16, 4, KOHYA, alpha=4.0)
    file.pair(block + lost, 48 if "qkv" in lost else 16, 16, 4, KOHYA, alpha=4.0)
    file.tensors[f"{block}{lost}.dora_scale"] = file.draw(1, 16)
    source, target = save(file, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    command = ["convert", source, target, "--to", "diffusers", "--names", "flux1"]
    assert f"{block}{lost} is a DoRA with a magnitude for each input" in refusal(*command)
    done = CliRunner().invoke(cli, [str(a) for a in [*command, "--dry-run", "--json"]])
    (loss,) = json.loads(done.stdout)["losses"]
    assert loss["name"] == block + lost
    assert loss["remedy"].startswith("Make it a plain LoRA first: loratools to-lora ")
    assert not target.exists()
    run(*command, "--allow-lossy")
    assert list(deltas(target)) == ["transformer.transformer_blocks.0.attn.to_out.0"]


@pytest.mark.parametrize(
    ("kind", "target"),
    [("loha", "peft"), ("loha", "mlx"), ("tucker", "peft"), ("full", "peft"), ("full", "mlx")],
)
def test_the_hint_for_kinds_without_factors_leads_on(tmp_path, kind, target):
    file, name = DialectFile("kohya", {"kohya"}, seed=5), "lora_unet_double_blocks_0_img_attn_proj"
    if kind == "loha":
        for end, shape in zip("abab", ((16, 2), (2, 16), (16, 2), (2, 16)), strict=True):
            number = 1 + (f"{name}.hada_w1_b" in file.tensors)
            file.tensors[f"{name}.hada_w{number}_{end}"] = file.draw(*shape)
    elif kind == "tucker":
        for end, shape in (("down", (2, 16, 1, 1)), ("mid", (2, 2, 3, 3)), ("up", (16, 2, 1, 1))):
            file.tensors[f"{name}.lora_{end}.weight"] = file.draw(*shape)
    else:
        file.tensors[f"{name}.diff"] = file.draw(16, 16)
    source, output = save(file, tmp_path / "in.safetensors"), tmp_path / "out"
    told = refusal("convert", source, output, "--to", target, "--names", "flux1")
    assert f"a change of kind {kind} is not converted to {target}" in told
    _, _, hint = told.partition("loratools ")
    words = shlex.split(hint.replace("RANK", "16"))
    words[-1] = str(tmp_path / words[-1])
    run(*words)
    run("convert", words[-1], output, "--to", target, "--names", "flux1")
    (found,), (wanted,) = deltas(output).values(), deltas(source).values()
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())


def test_an_adapter_loses_nothing_to_its_own_format(tmp_path):
    """Kinds that few pipelines load are no loss to a file that has them already."""
    file = DialectFile("diffusers", {"diffusers"}, seed=9)
    file.pair("transformer.blocks.0.to_k", 8, 8, 2, PEFT)
    for end, shape in (("w1_a", (64, 2)), ("w1_b", (2, 16)), ("w2_a", (64, 2)), ("w2_b", (2, 16))):
        file.tensors[f"transformer.blocks.0.to_q.hada_{end}"] = file.draw(*shape)
    file.pair("transformer.blocks.0.to_v", 8, 8, 2, PEFT)
    file.tensors["transformer.blocks.0.to_v.dora_scale"] = file.draw(1, 8)
    source, target = save(file, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    run("convert", source, target, "--to", "diffusers")
    assert tensors_of(target) == tensors_of(source)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_rounding_of_fused_parts_is_measured(tmp_path, dtype):
    """Two thirds of a value has no end in binary: even float32 rounds it."""
    file = DialectFile("diffusers", {"diffusers"}, seed=4)
    block = "transformer.transformer_blocks.0.attn"
    for part, alpha in (("to_q", 3.0), ("to_k", 2.0), ("to_v", 5.0)):
        file.pair(f"{block}.{part}", 16, 16, 4, KOHYA, alpha=alpha)
    file.tensors = {key: tensor.astype(dtype) for key, tensor in file.tensors.items()}
    source, target = save(file, tmp_path / "apart.safetensors"), tmp_path / "kohya.safetensors"
    command = ["convert", source, target, "--to", "kohya", "--names", "flux1", "--json", "-q"]
    done = json.loads(run(*command))
    changes = deltas(source)
    intended = np.concatenate([changes[f"{block}.to_{part}"] for part in "qkv"])
    (fused,) = deltas(target).values()
    error = np.linalg.norm(fused - intended) / np.linalg.norm(intended)
    assert 1e-9 < error < 1e-7
    assert done["relative_error"] == pytest.approx(error, rel=1e-3)
    assert done["modules"][0]["relative_error"] == pytest.approx(error, rel=1e-3)


def test_biases_go_where_their_modules_rows_go(tmp_path):
    """Fused with the rows of q, k and v, each by its own scale; and the halves swapped."""
    file, block = (
        DialectFile("diffusers", {"diffusers"}, seed=4),
        "transformer.transformer_blocks.0",
    )
    biases = {}
    for part, alpha in (("q", 3.0), ("k", 2.0), ("v", 8.0)):
        file.pair(f"{block}.attn.to_{part}", 16, 16, 4, PEFT, alpha=alpha)
        bias = file.draw(16)
        if part != "v":
            file.tensors[f"{block}.attn.to_{part}.lora_B.bias"] = bias
        biases[part] = bias.astype(np.float64) * (alpha / 4 if part != "v" else 0.0)
    file.pair("transformer.norm_out.linear", 32, 16, 4, PEFT, alpha=4.0)
    ends = file.draw(32)
    file.tensors["transformer.norm_out.linear.lora_B.bias"] = ends
    source = save(file, tmp_path / "bias.safetensors")
    before = deltas(source)
    for target, prefix, fold in (
        ("comfyui", "diffusion_model.", str),
        ("kohya", "lora_unet_", flattened),
    ):
        out = tmp_path / f"{target}.safetensors"
        run("convert", source, out, "--to", target, "--names", "flux1")
        after = {a.target: a.tensor.load(np.float64) for a in read_adapter(out).additions.values()}
        fused = prefix + fold("double_blocks.0.img_attn.qkv")
        last = prefix + fold("final_layer.adaLN_modulation.1")
        expected = np.concatenate([biases[part] for part in "qkv"])
        np.testing.assert_allclose(after[f"{fused}.bias"], expected, rtol=1e-6, atol=0)
        np.testing.assert_array_equal(after[f"{last}.bias"], np.roll(ends.astype(np.float64), 16))
        rows = np.concatenate([before[f"{block}.attn.to_{part}"] for part in "qkv"])
        np.testing.assert_allclose(deltas(out)[fused], rows, rtol=0, atol=1e-6)


def test_to_dora_leaves_no_plain_module_beside_doras(tmp_path):
    """diffusers could not load such a file: every module becomes a DoRA, or nothing is written."""
    file, block = DialectFile("diffusers", {"diffusers"}, seed=5), "transformer.blocks.0"
    file.pair(f"{block}.to_q", 8, 8, 2, PEFT)
    file.pair(f"{block}.to_k", 8, 8, 2, PEFT)
    weights = {f"blocks.0.to_{part}.weight": file.draw(8, 8).astype("f4") for part in "qk"}
    save_file(weights, tmp_path / "base.safetensors")
    source, target = save(file, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    command = ["to-dora", source, "--base", tmp_path / "base.safetensors", "-o", target]
    run(*command)
    assert all(delta.is_dora for delta in read_adapter(target).modules.values())
    target.unlink()
    file.tensors[f"{block}.to_k.lora_magnitude_vector"] = np.ones(8, np.float32)
    save(file, source)
    assert "it is a DoRA already" in refusal(*command)
    assert not target.exists()
