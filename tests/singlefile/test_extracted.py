"""LoRAs between two diffusion checkpoints, in names that loaders know."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import save
from safetensors.numpy import load_file, save_file
from test_diffusers import applied, pipelines, xl_file  # noqa: F401
from test_pipelines import all_in_one, expected, run, state

import loratools as lt
from loratools.cli import cli

pytestmark = pytest.mark.filterwarnings("ignore")


def changes(make, path):
    return {n: c for n, c in applied(make, path).items() if np.abs(c).max() > 1e-5}


@pytest.fixture
def sdxl(pipelines, tmp_path):  # noqa: F811
    """Return a pipeline, its all-in-one checkpoint, one with a LoRA in it, and the LoRA."""
    make = pipelines["xl"]
    path = save(xl_file(2.0), tmp_path / "lora.safetensors")
    before, after = state(make()), expected(make, path)
    # A bias and a norm that changed, as fine-tunes have them, and another VAE.
    for model, key in (
        ("unet", "mid_block.attentions.0.proj_in.bias"),
        ("unet", "mid_block.attentions.0.norm.weight"),
        ("text_encoder_2", next(k for k in after["text_encoder_2"] if "self_attn.q_proj.b" in k)),
    ):
        after[model][key] = after[model][key] + 0.5
    files = {}
    for name, whole in (("base", before), ("tuned", after)):
        files[name] = all_in_one("sdxl", whole)
        save_file(files[name], tmp_path / f"{name}.safetensors")
    files["tuned"]["first_stage_model.decoder.conv_in.weight"] = np.zeros((2, 2), np.float32)
    save_file(files["tuned"], tmp_path / "tuned.safetensors")
    return make, files, path


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_fusing_it_gives_the_tuned_checkpoint(sdxl, tmp_path, to):
    _, files, _ = sdxl
    output = tmp_path / f"{to}.safetensors"
    text = run(
        "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "-o", output,
        "--to", to, "--rank", "4",
    )  # fmt: skip
    assert "first_stage_model" in text
    assert lt.read(output).format == to
    run("fuse", tmp_path / "base.safetensors", output, "-o", tmp_path / "fused.safetensors")
    found = load_file(tmp_path / "fused.safetensors")
    found.pop("first_stage_model.decoder.conv_in.weight")
    wanted = dict(files["tuned"])
    wanted.pop("first_stage_model.decoder.conv_in.weight")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        np.testing.assert_allclose(found[key], tensor, rtol=0, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_diffusers_loads_it(sdxl, tmp_path, to):
    make, _, path = sdxl
    output = tmp_path / f"{to}.safetensors"
    text = run(
        "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "-o", output,
        "--to", to, "--rank", "4",
    )  # fmt: skip
    if to == "diffusers":
        assert "norms and biases that changed are left out" in text
    wanted = changes(make, path)
    if to == "kohya":  # diffusers refuses what it has no place for
        kept = {
            k: v for k, v in load_file(output).items() if "diff_b" not in k and "_norm" not in k
        }
        save_file(kept, output)
    found = changes(make, output)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        np.testing.assert_allclose(found[name], change, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    ("prefix", "config", "names"),
    [
        ("", None, ["transformer.transformer_blocks.0.attn.to_q"]),
        ("", "FluxTransformer2DModel", ["transformer.transformer_blocks.0.attn.to_q"]),
    ],
)
def test_bare_checkpoints_say_what_they_are(tmp_path, prefix, config, names):
    generator = np.random.default_rng(0)
    shapes = {
        "transformer_blocks.0.attn.to_q": (8, 8), "transformer_blocks.0.ff.net.0.proj": (32, 8),
        "transformer_blocks.0.ff.net.2": (8, 32), "single_transformer_blocks.0.proj_mlp": (32, 8),
        "single_transformer_blocks.0.proj_out": (8, 40), "norm_out.linear": (16, 8),
    }  # fmt: skip
    base = {
        f"{prefix}{n}.weight": generator.standard_normal(s).astype("f4") for n, s in shapes.items()
    }
    tuned = dict(base)
    key = f"{prefix}transformer_blocks.0.attn.to_q.weight"
    change = np.outer(np.arange(8), np.arange(8)).astype(np.float32)
    tuned[key] = base[key] + change
    for name, tensors in (("base", base), ("tuned", tuned)):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        if config is not None:
            (folder / "config.json").write_text(f'{{"_class_name": "{config}"}}')
    lt.extract(
        tmp_path / "base", tmp_path / "tuned", to="diffusers", rank=1,
        output=tmp_path / "x.safetensors",
    )  # fmt: skip
    found = lt.read(tmp_path / "x.safetensors")
    assert list(found.modules) == names
    np.testing.assert_allclose(lt.delta(found, names[0]), change, atol=1e-4)


def test_a_checkpoint_that_does_not_say_asks(tmp_path):
    base = {"a.0.b.weight": np.eye(4, dtype=np.float32)}
    for name, factor in (("base", 1), ("tuned", 2)):
        save_file({k: factor * v for k, v in base.items()}, tmp_path / f"{name}.safetensors")
    words = ["extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors",
             "-o", tmp_path / "x.safetensors", "--to", "diffusers", "--rank", "4"]  # fmt: skip
    done = CliRunner().invoke(cli, list(map(str, words)))
    assert "`component`" in done.exception.hint
    run(*words, "--component", "transformer")
    assert list(lt.read(tmp_path / "x.safetensors").modules) == ["transformer.a.0.b"]
