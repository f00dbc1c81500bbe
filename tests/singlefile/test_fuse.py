"""Single files fused into checkpoints of either naming of their architecture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import KOHYA, DialectFile, save
from safetensors.numpy import load_file, save_file
from test_dialects import dense

from loratools.cli import cli
from loratools.naming.tables import filled, find_table
from loratools_formats import read_adapter
from loratools_formats.disk.errors import AdapterError

H = 8
MODULES = {
    "transformer_blocks.0.attn.to_q": (H, H),
    "transformer_blocks.0.attn.to_k": (H, H),
    "transformer_blocks.0.attn.to_v": (H, H),
    "transformer_blocks.0.attn.to_out.0": (H, H),
    "transformer_blocks.0.ff.net.0.proj": (4 * H, H),
    "single_transformer_blocks.0.attn.to_q": (H, H),
    "single_transformer_blocks.0.attn.to_k": (H, H),
    "single_transformer_blocks.0.attn.to_v": (H, H),
    "single_transformer_blocks.0.proj_mlp": (4 * H, H),
    "single_transformer_blocks.0.proj_out": (H, 5 * H),
    "norm_out.linear": (2 * H, H),
}


def run(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def kohya_file(path):
    file = DialectFile("kohya", {"kohya"}, seed=1)
    double, single = "lora_unet_double_blocks_0", "lora_unet_single_blocks_0"
    file.pair(f"{double}_img_attn_qkv", 3 * H, H, 4, KOHYA, alpha=2.0)
    file.pair(f"{double}_img_mlp_0", 4 * H, H, 4, KOHYA, alpha=2.0)
    file.pair(f"{single}_linear1", 7 * H, H, 4, KOHYA, alpha=2.0)
    file.pair("lora_unet_final_layer_adaLN_modulation_1", 2 * H, H, 4, KOHYA, alpha=2.0)
    file.tensors["lora_unet_double_blocks_0_img_mlp_0.diff_b"] = file.draw(4 * H, dtype=np.float32)
    return save(file, path)


@pytest.fixture
def bases(tmp_path):
    """Return one model as three checkpoints: diffusers' folder, original, and all-in-one."""
    rng = np.random.default_rng(0)
    diffusers, original = {}, {}
    for name, shape in MODULES.items():
        diffusers[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
        diffusers[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    pieces = {}
    for name in MODULES:
        place = find_table("flux1").locate(name, flat=False, schemes=("diffusers",))
        target = filled(place.row.original, place.numbers)
        pieces.setdefault(target, []).append((place.covered[0], name, place.row.swapped_halves))
    for target, parts in pieces.items():
        for leaf in ("weight", "bias"):
            whole = np.concatenate([diffusers[f"{name}.{leaf}"] for _, name, _ in sorted(parts)])
            if parts[0][2]:
                whole = np.concatenate([whole[H:], whole[:H]])
            original[f"{target}.{leaf}"] = whole
    folder = tmp_path / "diffusers"
    folder.mkdir()
    save_file(diffusers, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    save_file(original, tmp_path / "original.safetensors")
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
    whole["first_stage_model.decoder.conv_in.weight"] = np.ones((2, 2), np.float32)
    save_file(whole, tmp_path / "whole.safetensors")
    return {"diffusers": folder, "original": tmp_path / "original.safetensors",
            "whole": tmp_path / "whole.safetensors"}  # fmt: skip


def changes(before, after):
    old, new = load_file(before), load_file(after)
    assert set(old) == set(new)
    return {n: new[n].astype(np.float64) - old[n] for n in old if (new[n] != old[n]).any()}


def test_each_naming_gets_the_same_change(bases, tmp_path):
    adapter = kohya_file(tmp_path / "kohya.safetensors")
    expected = {name: dense(delta) for name, delta in read_adapter(adapter).modules.items()}
    bias = next(iter(read_adapter(adapter).additions.values())).tensor.load(np.float64)
    for name in ("original", "whole"):
        out = tmp_path / f"fused-{name}.safetensors"
        run("fuse", bases[name], adapter, "-o", out)
        found = changes(bases[name], out)
        start = "model.diffusion_model." if name == "whole" else ""
        for target, flat in (
            ("double_blocks.0.img_attn.qkv", "double_blocks_0_img_attn_qkv"),
            ("double_blocks.0.img_mlp.0", "double_blocks_0_img_mlp_0"),
            ("single_blocks.0.linear1", "single_blocks_0_linear1"),
            ("final_layer.adaLN_modulation.1", "final_layer_adaLN_modulation_1"),
        ):
            change = found.pop(f"{start}{target}.weight")
            np.testing.assert_allclose(change, expected[f"lora_unet_{flat}"], atol=1e-6)
        added = found.pop(f"{start}double_blocks.0.img_mlp.0.bias")
        np.testing.assert_allclose(added, bias, atol=1e-6)
        assert not found
    out = tmp_path / "fused"
    run("fuse", bases["diffusers"], adapter, "-o", out)
    file = "diffusion_pytorch_model.safetensors"
    found = changes(bases["diffusers"] / file, out / file)
    qkv = expected["lora_unet_double_blocks_0_img_attn_qkv"]
    linear1 = expected["lora_unet_single_blocks_0_linear1"]
    modulation = expected["lora_unet_final_layer_adaLN_modulation_1"]
    for module, change in {
        "transformer_blocks.0.attn.to_q": qkv[:H],
        "transformer_blocks.0.attn.to_k": qkv[H : 2 * H],
        "transformer_blocks.0.attn.to_v": qkv[2 * H :],
        "transformer_blocks.0.ff.net.0.proj": expected["lora_unet_double_blocks_0_img_mlp_0"],
        "single_transformer_blocks.0.attn.to_q": linear1[:H],
        "single_transformer_blocks.0.attn.to_k": linear1[H : 2 * H],
        "single_transformer_blocks.0.attn.to_v": linear1[2 * H : 3 * H],
        "single_transformer_blocks.0.proj_mlp": linear1[3 * H :],
        "norm_out.linear": np.concatenate([modulation[H:], modulation[:H]]),
    }.items():
        np.testing.assert_allclose(found.pop(f"{module}.weight"), change, atol=1e-6)
    np.testing.assert_allclose(
        found.pop("transformer_blocks.0.ff.net.0.proj.bias"), bias, atol=1e-6
    )
    assert not found


def test_an_adapter_in_diffusers_naming_goes_into_an_original_checkpoint(bases, tmp_path):
    kohya = kohya_file(tmp_path / "kohya.safetensors")
    named = tmp_path / "named.safetensors"
    run("convert", kohya, named, "--to", "diffusers", "--allow-lossy")
    run("fuse", bases["original"], named, "-o", tmp_path / "out.safetensors")
    found = changes(bases["original"], tmp_path / "out.safetensors")
    for name, delta in read_adapter(kohya).modules.items():
        (key,) = [key for key in found if key.replace(".", "_") == f"{name[10:]}_weight"]
        np.testing.assert_allclose(found[key], dense(delta), atol=1e-6)


def test_fused_in_and_taken_out_is_the_base_again(bases, tmp_path):
    adapter = kohya_file(tmp_path / "kohya.safetensors")
    run("fuse", bases["original"], adapter, "-o", tmp_path / "in.safetensors")
    run("fuse", tmp_path / "in.safetensors", f"{adapter}:-1", "-o", tmp_path / "out.safetensors")
    base, back = load_file(bases["original"]), load_file(tmp_path / "out.safetensors")
    for name, tensor in base.items():
        np.testing.assert_allclose(back[name], tensor, atol=1e-6)


def test_a_module_that_the_base_lacks_stops_everything(bases, tmp_path):
    file = DialectFile("kohya", {"kohya"}, seed=2)
    file.pair("lora_unet_double_blocks_7_img_mlp_0", 32, 8, 4, KOHYA, alpha=2.0)
    adapter = save(file, tmp_path / "kohya.safetensors")
    out = tmp_path / "out.safetensors"
    done = CliRunner().invoke(cli, ["fuse", str(bases["original"]), str(adapter), "-o", str(out)])
    assert "lora_unet_double_blocks_7_img_mlp_0" in str(done.exception)
    assert not out.exists()


def test_to_dora_to_lora_and_merge_find_weights_in_the_base(bases, tmp_path):
    """A LoRA becomes a DoRA with the same change, which is merged and made plain again."""
    file = DialectFile("kohya", {"kohya"}, seed=3)
    for name, out in (
        ("double_blocks_0_img_attn_qkv", 3 * H),
        ("double_blocks_0_img_mlp_0", 4 * H),
    ):
        file.pair(f"lora_unet_{name}", out, H, 4, KOHYA, alpha=2.0)
    plain, base = save(file, tmp_path / "plain.safetensors"), bases["original"]
    dora, back = tmp_path / "dora.safetensors", tmp_path / "back.safetensors"
    run("to-dora", plain, "--base", base, "-o", dora)
    keys = {name: list(tensor.shape) for name, tensor in load_file(dora).items()}
    assert keys["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] == [3 * H, 1]
    rank = ("--rank", str(H), "--dtype", "f32")
    run("to-lora", dora, "--base", base, "-o", back, *rank)
    merged = tmp_path / "merged.safetensors"
    run("merge", f"{dora}:0.5", f"{plain}:0.5", "--base", base, "-o", merged, *rank)
    for path in (back, merged):
        for name, delta in read_adapter(path).modules.items():
            np.testing.assert_allclose(dense(delta), file.deltas[name], atol=1e-5)
    fused = tmp_path / "fused.safetensors"
    run("fuse", base, dora, "-o", fused)
    found = changes(base, fused)
    for name, expected in file.deltas.items():
        (key,) = [key for key in found if key.replace(".", "_") == f"{name[10:]}_weight"]
        np.testing.assert_allclose(found[key], expected, atol=1e-5)


def test_a_dora_of_inputs_is_never_taken_for_one_of_outputs(bases, tmp_path):
    """Square weights would let it pass; LyCORIS before version 3 saves them."""
    file = DialectFile("kohya", {"kohya"}, seed=4)
    name = "lora_unet_double_blocks_0_img_attn_proj"
    file.pair(name, H, H, 4, KOHYA, alpha=2.0)
    file.tensors[f"{name}.dora_scale"] = np.linspace(1.0, 3.0, H).astype(np.float32)[None, :]
    dora, base = save(file, tmp_path / "dora.safetensors"), bases["original"]
    weight = load_file(base)["double_blocks.0.img_attn.proj.weight"].astype(np.float64)
    whole = weight + file.deltas[name]
    expected = np.linspace(1.0, 3.0, H) / np.linalg.norm(whole, axis=0) * whole - weight
    fused, plain, merged = (tmp_path / f"{n}.safetensors" for n in ("fused", "plain", "merged"))
    rank = ("--base", base, "--rank", str(H), "--dtype", "f32")
    run("fuse", base, dora, "-o", fused)
    run("to-lora", dora, *rank, "-o", plain)
    run("merge", f"{dora}:0.5", f"{dora}:0.5", *rank, "-o", merged)
    (change,) = changes(base, fused).values()
    for found in (change, *(dense(read_adapter(p).modules[name]) for p in (plain, merged))):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    squeezed = tmp_path / "squeezed.safetensors"
    run("squeeze", dora, "-o", squeezed, "--rank", "2")
    found = read_adapter(squeezed).modules[name]
    assert found.axis == "input"
    assert found.magnitude.shape == (1, H)


def test_what_is_not_of_low_rank_goes_in_without_loss(bases, tmp_path):
    """A difference of a fused weight, into checkpoints that have it whole and in parts."""
    file = DialectFile("kohya", {"kohya", "LyCORIS"}, seed=5)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file.tensors[f"{name}.diff"] = diff = file.draw(3 * H, H)
    file.pair("lora_unet_double_blocks_0_img_mlp_0", 4 * H, H, 4, KOHYA, alpha=2.0)
    adapter = save(file, tmp_path / "full.safetensors")
    out, folder = tmp_path / "out.safetensors", tmp_path / "out"
    run("fuse", bases["original"], f"{adapter}:-0.5", "-o", out)
    found = changes(bases["original"], out)
    change = -0.5 * diff.astype(np.float64)
    np.testing.assert_allclose(found["double_blocks.0.img_attn.qkv.weight"], change, atol=1e-6)
    run("fuse", bases["diffusers"], f"{adapter}:-0.5", "-o", folder)
    files = "diffusion_pytorch_model.safetensors"
    found = changes(bases["diffusers"] / files, folder / files)
    split = [found.pop(f"transformer_blocks.0.attn.to_{n}.weight") for n in "qkv"]
    np.testing.assert_allclose(np.concatenate(split), change, atol=1e-6)
    assert list(found) == ["transformer_blocks.0.ff.net.0.proj.weight"]


def test_marks_of_each_model_in_one_file_are_left_out(tmp_path):
    """ComfyUI's mark of a whole model has the prefix of the model's weights."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    unet, text = "model.diffusion_model.", "text_encoders.t5xxl.transformer."
    module = "encoder.block.0.layer.0.SelfAttention.q"
    weights = (f"{unet}double_blocks.0.img_attn.proj", f"{text}{module}")
    tensors = {}
    for start, name in zip((unet, text), weights, strict=True):
        tensors[f"{name}.weight"] = torch.randn(8, 8).to(torch.float8_e4m3fn)
        tensors[f"{name}.scale_weight"] = torch.tensor([0.5])
        tensors[f"{start}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    base = tmp_path / "base.safetensors"
    save_torch(tensors, base)
    file = DialectFile("kohya", {"kohya"})
    file.pair(f"lora_te3_{module.replace('.', '_')}", 8, 8, 2, KOHYA)
    source = save(file, tmp_path / "lora.safetensors")
    run("fuse", base, source, "-o", tmp_path / "fused.safetensors")
    fused = load_torch(tmp_path / "fused.safetensors")
    assert set(fused) == {f"{name}.weight" for name in weights}
    (delta,) = file.deltas.values()
    stored = tensors[f"{weights[1]}.weight"].double() * 0.5
    expected = stored + torch.from_numpy(np.asarray(delta, np.float64))
    found = fused[f"{weights[1]}.weight"].double()
    assert (found - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("mark", ["comfy_quant", "metadata", "scaled_fp8", "scale_weight"])
def test_scaled_eight_bits_of_comfyui_become_16_and_lose_their_marks(tmp_path, mark):
    """ComfyUI would multiply 16-bit weights by no scale, or refuse them, as eight-bit ones."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file as save_torch

    torch.manual_seed(0)
    module, other = "blocks.0.self_attn.q", "blocks.0.self_attn.k"
    weight = torch.randn(8, 8)
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors, metadata = {f"{other}.weight": torch.randn(8, 8)}, {"title": "kept"}
    tensors[f"{module}.weight"] = codes
    beside = "scale_weight" if mark.startswith("scale") else "weight_scale"
    tensors[f"{module}.{beside}"] = scale
    if mark == "comfy_quant":
        text = json.dumps({"format": "float8_e4m3fn"}).encode()
        tensors[f"{module}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    elif mark == "metadata":
        layers = {module: {"format": "float8_e4m3fn"}}
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    elif mark == "scaled_fp8":
        tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    base = tmp_path / "base.safetensors"
    save_torch(tensors, base, metadata)
    file = DialectFile("comfyui", {"comfyui"})
    file.pair(f"diffusion_model.{module}", 8, 8, 2, KOHYA)
    source = save(file, tmp_path / "lora.safetensors")
    run("fuse", base, source, "-o", tmp_path / "fused")
    with safe_open(tmp_path / "fused", "pt") as fused:
        assert set(fused.keys()) == {f"{module}.weight", f"{other}.weight"}
        assert fused.metadata() == {"title": "kept"} | {
            key: value for key, value in fused.metadata().items() if key.startswith("loratools.")
        }
        found = fused.get_tensor(f"{module}.weight")
    assert found.dtype == torch.bfloat16
    (delta,) = file.deltas.values()
    expected = codes.double() * scale.double() + torch.from_numpy(np.asarray(delta, np.float64))
    assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max()


def test_a_module_in_two_spellings_is_not_fused_once(tmp_path):
    """Loaders take either of the two; one of them would be lost without a word."""
    rng = np.random.default_rng(0)
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, H), (H, 4)))
    flat, dotted = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
    save_file({f"{dotted.removeprefix('unet.')}.weight": np.zeros((H, H), np.float32)},
              tmp_path / "base.safetensors")  # fmt: skip
    tensors = {
        f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up,
        f"{dotted}.lora_A.weight": down, f"{dotted}.lora_B.weight": 2 * up,
    }  # fmt: skip
    save_file(tensors, tmp_path / "adapter.safetensors")
    words = ["fuse", tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", "-o"]
    words += [tmp_path / "fused.safetensors"]
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert isinstance(done.exception, AdapterError)
    assert "two modules are one in the base" in str(done.exception)
    assert not (tmp_path / "fused.safetensors").exists()
    run(*words, "--drop", r"^unet\.")  # which the hint says
    fused = load_file(tmp_path / "fused.safetensors")
    assert np.allclose(next(iter(fused.values())), up @ down, rtol=1e-6, atol=1e-6)
