"""alpha of 0 and below: every output of every command is one that every command reads."""

from __future__ import annotations

import numpy as np
import pytest
from dialect_files import KOHYA, DialectFile, save
from test_resolution import deltas, run

NAME = "lora_unet_blocks_0_self_attn_q"
OTHER = "lora_unet_blocks_0_self_attn_k"


def adapter_of(path, alpha):
    file = DialectFile("kohya", {"kohya"}, seed=round(abs(alpha)))
    file.pair(NAME, 8, 8, 3, KOHYA, alpha=alpha)
    file.pair(OTHER, 8, 8, 3, KOHYA, alpha=4.0)
    file.tensors = {key: np.asarray(t, np.float32) for key, t in file.tensors.items()}
    return save(file, path)


def both(path):
    """Return the changes of the two modules, in the order of their names."""
    return np.stack([delta for _, delta in sorted(deltas(path).items())])


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, -4.0])
@pytest.mark.parametrize("option", [(), ("--keep-alpha",), ("--fold-alpha",)])
@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya", "peft"])
def test_conversions_are_read_by_every_command(tmp_path, alpha, target, option):
    source = adapter_of(tmp_path / "in.safetensors", alpha)
    out = tmp_path / ("out" if target == "peft" else "out.safetensors")
    if target == "peft":
        run("convert", source, out, "--to", target, "--names", "wan2")
    else:
        run("convert", source, out, "--to", target, *option)
    np.testing.assert_allclose(both(out), both(source), rtol=0, atol=1e-6)
    small, merged = (tmp_path / f"{name}{out.suffix}" for name in ("small", "merged"))
    run("squeeze", out, "-o", small, "--rank", "3")
    run("merge", f"{out}:2", "-o", merged)
    run("spectrum", out)
    for made, factor in ((small, 1), (merged, 2)):
        found = both(made)
        np.testing.assert_allclose(found, factor * both(source), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alphas", [(0.0, 4.0), (4.0, 0.0), (-4.0, 4.0), (0.0, 0.0), (-4.0, 0.0)])
def test_merges_are_sums(tmp_path, alphas):
    paths = [adapter_of(tmp_path / f"{i}.safetensors", alpha) for i, alpha in enumerate(alphas)]
    out = tmp_path / "out.safetensors"
    run("merge", *paths, "-o", out)
    expected = sum(both(path) for path in paths)
    np.testing.assert_allclose(both(out), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, -4.0])
def test_a_kept_alpha_is_one_that_can_be_kept(tmp_path, alpha):
    source, out = adapter_of(tmp_path / "in.safetensors", alpha), tmp_path / "out.safetensors"
    run("squeeze", source, "-o", out, "--rank", "3", "--keep-alpha")
    np.testing.assert_allclose(both(out), both(source), rtol=0, atol=1e-5)


@pytest.mark.parametrize("alphas", [(0.0, 4.0, -3.0), (4.0, 0.0, None), (0.0, 0.0, 0.0)])
def test_parts_of_a_fused_module_may_have_a_scale_of_zero(tmp_path, alphas):
    """OneTrainer's queries, keys and values are FLUX.1's qkv; whichever of them is not there."""
    path = tmp_path / "in.safetensors"
    file = DialectFile("kohya", {"kohya"}, seed=2)
    for part, alpha in zip("qkv", alphas, strict=True):
        if alpha is not None:
            name = f"lora_transformer_single_transformer_blocks_0_attn_to_{part}"
            file.pair(name, 8, 8, 3, KOHYA, alpha=alpha)
    file.pair("lora_transformer_single_transformer_blocks_0_proj_mlp", 32, 8, 2, KOHYA, alpha=2.0)
    file.tensors = {key: np.asarray(t, np.float32) for key, t in file.tensors.items()}
    changes = {name.rpartition("_")[2]: delta for name, delta in deltas(save(file, path)).items()}
    wanted = np.concatenate(
        [changes.get(part, np.zeros((8, 8))) for part in ("q", "k", "v", "mlp")]
    )
    for target in ("comfyui", "kohya"):
        out = tmp_path / f"{target}.safetensors"
        run("convert", path, out, "--to", target, "--names", "flux1")
        (found,) = deltas(out).values()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
