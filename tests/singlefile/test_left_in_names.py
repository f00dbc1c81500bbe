"""Keys with prefixes that are doubled, of another naming, or left there by training code."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.naming.named_modules import NamedModules
from loratools_formats.formats.singlefile.left_in_names import cleaned

PATH = "blocks.3.self_attn.q"
PROPER = f"diffusion_model.{PATH}"
HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (48, 16),
    "double_blocks.0.img_mlp.fc1": (64, 16),
    "single_blocks.0.modulation.linear": (48, 16),
    "final_layer.adaLN_modulation.1": (32, 16),
}


def pairs(shapes, start, leaves=("lora_A", "lora_B")):
    """Return factors of rank 2 of each module, and each ΔW."""
    generator = np.random.default_rng(0)
    tensors, changes = {}, {}
    for name, (rows, columns) in shapes.items():
        a = generator.standard_normal((2, columns)).astype(np.float32)
        b = generator.standard_normal((rows, 2)).astype(np.float32)
        tensors[f"{start}{name}.{leaves[0]}.weight"] = a
        tensors[f"{start}{name}.{leaves[1]}.weight"] = b
        changes[name] = b.astype(float) @ a.astype(float)
    return tensors, changes


def saved(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    "start",
    [
        "model.diffusion_model.",
        "diffusion_model.diffusion_model.",
        "model.diffusion_model.diffusion_model.",
        "pipe.dit.",
        "module.diffusion_model.",
        "diffusion_model._orig_mod.",
    ],
)
@pytest.mark.parametrize("command", ["squeeze", "comfyui", "kohya", "diffusers"])
def test_what_training_code_left_is_not_written(tmp_path, start, command):
    tensors, changes = pairs({PATH: (16, 16)}, start)
    source, out = saved(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    if command == "squeeze":
        result = lt.squeeze(source, rank=2, output=out)
        expected = PROPER
    else:
        result = lt.convert(source, to=command, output=out)
        expected = {
            "comfyui": PROPER,
            "kohya": "lora_unet_blocks_3_self_attn_q",
            "diffusers": "transformer.blocks.3.attn1.to_q",
        }[command]
    adapter = lt.read(out)
    assert set(adapter.modules) == {expected}
    np.testing.assert_allclose(lt.delta(adapter, expected), changes[PATH], atol=1e-5)
    assert "wrapped-names" in [finding.code for finding in result.findings]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("lora_unet_lora_unet_mid_block_x.alpha", "lora_unet_mid_block_x.alpha"),
        ("lora_unet_model_diffusion_model_blocks_0.alpha", "lora_unet_blocks_0.alpha"),
        ("lora_transformer__orig_mod_x.alpha", "lora_transformer_x.alpha"),
        ("transformer.transformer.x.lora_A.weight", "transformer.x.lora_A.weight"),
        ("transformer.transformer_blocks.0.x.alpha", "transformer.transformer_blocks.0.x.alpha"),
        ("lora_unet__blocks_0_ffn_0.alpha", "lora_unet__blocks_0_ffn_0.alpha"),
        ("unet.down_blocks.0.x.alpha", "unet.down_blocks.0.x.alpha"),
    ],
)
def test_only_what_is_too_much_is_left_out(key, expected):
    assert cleaned(key) == expected


def test_two_keys_that_become_one_are_refused(tmp_path):
    tensors = pairs({PATH: (16, 16)}, "model.diffusion_model.")[0]
    tensors |= pairs({PATH: (16, 16)}, "diffusion_model.")[0]
    source = saved(tmp_path / "in.safetensors", tensors)
    with pytest.raises(lt.LoratoolsError, match="two tensors have one name"):
        lt.read(source)


def test_check_tells_what_loaders_leave_out(tmp_path):
    source = saved(tmp_path / "in.safetensors", pairs({PATH: (16, 16)}, "pipe.dit.")[0])
    (found,) = lt.check(source).findings
    assert found.code == "LT402"


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya"])
def test_diffusion_pipes_prefix_of_hunyuan_video(tmp_path, target):
    """It writes `transformer.` before the original names, which ComfyUI reads."""
    proper, changes = pairs(HUNYUAN, "diffusion_model.")
    tensors = {f"transformer.{k.removeprefix('diffusion_model.')}": v for k, v in proper.items()}
    metadata = {"modelspec.architecture": "hunyuan-video/lora"}
    made = {}
    for name, contents in (("own", proper), ("prefixed", tensors)):
        source = saved(tmp_path / f"{name}.safetensors", contents, metadata)
        made[name] = tmp_path / f"{name}-{target}.safetensors"
        lt.convert(source, to=target, output=made[name])
    own, prefixed = load_file(made["own"]), load_file(made["prefixed"])
    assert own.keys() == prefixed.keys()
    for key, tensor in own.items():
        np.testing.assert_array_equal(prefixed[key], tensor)
    assert len(changes) <= len(lt.read(made["prefixed"]).modules)


def test_names_of_diffusers_are_never_taken_for_original_ones(tmp_path):
    """Z-Image's MLPs have the names that Lumina 2's have in its original naming."""
    shapes = {f"layers.0.feed_forward.w{number}": (16, 16) for number in (1, 2, 3)}
    source = saved(tmp_path / "in.safetensors", pairs(shapes, "transformer.")[0])
    adapter = lt.read(source)
    file = NamedModules.of(adapter, {name: name for name in adapter.modules})
    assert not file.has_foreign_prefixes()
    out = tmp_path / "out.safetensors"
    lt.convert(source, to="diffusers", output=out)
    assert set(lt.read(out).modules) == set(adapter.modules)


def test_a_peft_file_of_a_diffusion_model_is_one_by_any_of_its_modules(tmp_path):
    shapes = {"x_embedder": (16, 4), "transformer_blocks.0.attn.to_q": (16, 16)}
    source = saved(tmp_path / "in.safetensors", pairs(shapes, "base_model.model.")[0])
    adapter = lt.read(source)
    assert adapter.format == "safetensors"
    assert {change.kind for change in adapter.modules.values()} == {"lora"}
    alone = pairs({"x_embedder": (16, 4)}, "base_model.model.")[0]
    assert lt.read(saved(tmp_path / "alone.safetensors", alone)).format == "peft-weights"


def test_unprefixed_files_of_flux_are_no_control_adapters(tmp_path):
    """BFL's widen the input, and say so by scales of norms; others have no shape to state."""
    shapes = {"img_in": (16, 4), "double_blocks.0.img_attn.qkv": (48, 16)}
    source = saved(tmp_path / "in.safetensors", pairs(shapes, "")[0])
    assert [dialect.name for dialect in lt.read(source).dialects] == ["unprefixed"]
    out = tmp_path / "out.safetensors"
    lt.convert(source, to="comfyui", names="flux1", output=out)
    assert set(lt.read(out).modules) == {f"diffusion_model.{name}" for name in shapes}
    assert not lt.read(out).carried


def test_a_stated_shape_that_factors_show_is_no_loss(tmp_path):
    tensors, _ = pairs({"img_in": (16, 4)}, "diffusion_model.")
    tensors["diffusion_model.img_in.reshape_weight"] = np.array([16, 4])
    source, out = saved(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    lt.convert(source, to="diffusers", names="flux1", output=out)
    assert set(lt.read(out).modules) == {"transformer.x_embedder"}
    tensors["diffusion_model.img_in.reshape_weight"] = np.array([16, 8])
    other = saved(tmp_path / "other.safetensors", tensors)
    with pytest.raises(lt.LoratoolsError, match="reshape_weight"):
        lt.convert(other, to="diffusers", names="flux1", output=tmp_path / "none.safetensors")


@pytest.mark.parametrize("kind", ["alpha alone", "rank 0"])
@pytest.mark.parametrize("target", ["kohya", "diffusers", "comfyui"])
def test_what_changes_nothing_is_told_and_left(tmp_path, kind, target):
    name, idle = "lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_self_attn_q"
    tensors, changes = pairs({name: (16, 16)}, "", ("lora_down", "lora_up"))
    tensors[f"{idle}.alpha"] = np.array(1.0, np.float32)
    if kind == "rank 0":
        tensors[f"{idle}.lora_down.weight"] = np.zeros((0, 16), np.float32)
        tensors[f"{idle}.lora_up.weight"] = np.zeros((16, 0), np.float32)
    source, out = saved(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    result = lt.convert(source, to=target, output=out)
    assert "idle-modules" in [finding.code for finding in result.findings]
    adapter = lt.read(out)
    (written,) = adapter.modules
    np.testing.assert_allclose(lt.delta(adapter, written), changes[name], atol=1e-5)


@pytest.mark.parametrize("longer", ["down", "up"])
def test_factors_of_unlike_dimensions_are_read_as_loaders_flatten_them(tmp_path, longer):
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors, changes = pairs({name: (16, 16)}, "", ("lora_down", "lora_up"))
    key = f"{name}.lora_{longer}.weight"
    tensors[key] = tensors[key][..., None, None]
    adapter = lt.read(saved(tmp_path / "in.safetensors", tensors))
    np.testing.assert_allclose(lt.delta(adapter, name), changes[name], atol=1e-12)


def test_a_raw_state_dict_of_peft_has_its_adapters_name_at_the_end(tmp_path):
    """PEFT before 0.12 kept magnitudes, and keeps embeddings, in dictionaries of parameters."""
    start = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{start}.lora_A.default.weight": np.ones((2, 4), np.float32),
        f"{start}.lora_B.default.weight": np.ones((6, 2), np.float32),
        f"{start}.lora_magnitude_vector.default": np.ones(6, np.float32),
        "text_encoder.shared.lora_embedding_A.default": np.ones((2, 9), np.float32),
        "text_encoder.shared.lora_embedding_B.default": np.ones((5, 2), np.float32),
    }
    adapter = lt.read(saved(tmp_path / "in.safetensors", tensors))
    assert adapter.modules[start].is_dora
    assert adapter.modules["text_encoder.shared"].layer.kind == "embedding"


def test_the_messages_name_a_key(tmp_path):
    source = saved(tmp_path / "in.safetensors", pairs({PATH: (16, 16)}, "pipe.dit.")[0])
    (note,) = [f.message for f in lt.read(source).findings if f.code == "wrapped-names"]
    assert f"pipe.dit.{PATH}.lora_A.weight is {PROPER}.lora_A.weight" in note
