"""Files that spell one architecture's modules differently, merged and brought into one spelling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from dialect_files import KOHYA, PEFT, DialectFile, save
from test_resolution import deltas, run

import loratools as lt

Z_IMAGE = "diffusion_model.layers.0"
CLIP = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def z_image(path, spelling, seed):
    """Return a file of one block: as musubi, ai-toolkit or diffusers has it."""
    file = DialectFile(spelling, {"comfyui"}, seed=seed)
    if spelling == "fused":
        file.pair(f"{Z_IMAGE}.attention.qkv", 24, 8, 2, PEFT)
        file.pair(f"{Z_IMAGE}.attention.out", 8, 8, 2, PEFT)
    start = Z_IMAGE if spelling == "fused" or spelling == "split" else "transformer.layers.0"
    if spelling != "fused":
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            file.pair(f"{start}.attention.{name}", 8, 8, 2, PEFT)
    file.pair(f"{start}.feed_forward.w1", 16, 8, 2, PEFT)
    return save(file, path)


def as_fused(path):
    """Return the changes of a file of Z-Image by what they change."""
    found = {name.partition("layers.0.")[2]: delta for name, delta in deltas(path).items()}
    if "attention.to_q" in found:
        parts = [found.pop(f"attention.to_{part}") for part in "qkv"]
        found["attention.qkv"] = np.concatenate(parts)
        found["attention.out"] = found.pop("attention.to_out.0")
    return found


@pytest.mark.parametrize("pair", itertools.permutations(("fused", "split", "diffusers"), 2))
def test_a_merge_has_each_module_once_as_the_first_spells_it(tmp_path, pair):
    paths = [z_image(tmp_path / f"{s}.safetensors", s, seed) for seed, s in enumerate(pair)]
    out = tmp_path / "out.safetensors"
    run("merge", f"{paths[0]}:0.75", f"{paths[1]}:-0.5", "-o", out, "--dtype", "f32")
    assert set(deltas(out)) == set(deltas(paths[0]))
    first, second, merged = (as_fused(path) for path in (*paths, out))
    for name, delta in merged.items():
        expected = 0.75 * first[name] - 0.5 * second[name]
        np.testing.assert_allclose(delta, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_kohyas_and_onetrainers_names_are_one_modules(tmp_path, encoder, order):
    names = {
        "kohya": "lora_unet_double_blocks_0_img_attn_proj",
        "onetrainer": "lora_transformer_transformer_blocks_0_attn_to_out_0",
    }
    paths = []
    for seed, (maker, name) in enumerate(names.items()):
        file = DialectFile(maker, {"kohya"}, seed=seed)
        file.pair(name, 8, 8, 2, KOHYA, alpha=2.0)
        if encoder:
            file.pair(CLIP, 16, 8, 2, KOHYA, alpha=2.0)
        paths.append(save(file, tmp_path / f"{maker}.safetensors"))
    own = list(names.values())[::order][0]
    out = tmp_path / "out.safetensors"
    run("merge", *paths[::order], "-o", out, "--dtype", "f32")
    found = deltas(out)
    assert set(found) == {own, CLIP} if encoder else {own}
    expected = sum(deltas(path)[name] for path, name in zip(paths, names.values(), strict=True))
    np.testing.assert_allclose(found[own], expected, rtol=0, atol=1e-5)


def test_converting_to_the_class_that_a_file_has_makes_its_names_the_usual_ones(tmp_path):
    source = z_image(tmp_path / "split.safetensors", "split", 3)
    out = tmp_path / "out.safetensors"
    run("convert", source, out, "--to", "comfyui")
    names = ("attention.qkv", "attention.out", "feed_forward.w1")
    assert set(deltas(out)) == {f"{Z_IMAGE}.{name}" for name in names}
    before, after = as_fused(source), as_fused(out)
    for name, delta in before.items():
        np.testing.assert_array_equal(after[name], delta)


def test_names_that_fit_several_tables_stay_and_that_is_said(tmp_path):
    file = DialectFile("onetrainer", {"kohya"})
    name = "lora_transformer_transformer_blocks_0_attn_to_out_0"
    file.pair(name, 8, 8, 2, KOHYA, alpha=2.0)
    source, out = save(file, tmp_path / "in.safetensors"), tmp_path / "out.safetensors"
    said = run("convert", source, out, "--to", "kohya")
    assert "names stay as they are: the names fit several architectures" in said
    assert set(deltas(out)) == {name}
    run("convert", source, out, "--to", "kohya", "--names", "flux1", "--overwrite")
    assert set(deltas(out)) == {"lora_unet_double_blocks_0_img_attn_proj"}


@pytest.mark.parametrize("pair", itertools.permutations(("fused", "split", "diffusers"), 2))
def test_compare_finds_each_module_in_both(tmp_path, pair):
    """Split or fused, the cosine is that of all changes, in float64."""
    paths = [z_image(tmp_path / f"{s}.safetensors", s, seed) for seed, s in enumerate(pair)]
    found = lt.compare({"one": paths[0], "other": paths[1]})
    assert {module.name for module in found.modules} == set(deltas(paths[0]))
    first, second = (as_fused(path) for path in paths)
    dot = sum(np.vdot(delta, second[name]) for name, delta in first.items())
    one, two = (np.sqrt(sum(np.vdot(d, d) for d in each.values())) for each in (first, second))
    np.testing.assert_allclose(found.cosines[0][1], dot / (one * two), rtol=0, atol=1e-6)


def test_compare_takes_kohyas_and_onetrainers_names_for_one(tmp_path):
    paths = []
    for maker, name in (
        ("kohya", "lora_unet_double_blocks_0_img_attn_proj"),
        ("onetrainer", "lora_transformer_transformer_blocks_0_attn_to_out_0"),
    ):
        file = DialectFile("kohya", {"kohya"}, seed=1)
        file.pair(name, 8, 8, 2, KOHYA, alpha=1.0)
        file.metadata["modelspec.architecture"] = "flux-1-dev/lora"
        paths.append(save(file, tmp_path / f"{maker}.safetensors"))
    found = lt.compare({"one": paths[0], "other": paths[1]})
    np.testing.assert_allclose(found.cosines[0][1], 1.0, rtol=0, atol=1e-6)
