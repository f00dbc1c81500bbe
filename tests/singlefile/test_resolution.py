"""How names are resolved, and what is said where they are not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import GOLDEN, KOHYA, MAKERS, PEFT, DialectFile, save
from rounding import assert_equal_products
from safetensors.numpy import save_file
from test_dialects import Known, dense, tensors_of

from loratools.cli import cli
from loratools.naming.tables import flattened
from loratools_formats import read_adapter


def run(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refusal(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code != 0
    return str(done.exception)


def deltas(path):
    return {name: dense(delta) for name, delta in read_adapter(path).modules.items()}


def dotted_file(path, *names, leaves=PEFT, alpha=None, seed=1):
    file = DialectFile("diffusers", {"diffusers"}, seed=seed)
    for name in names:
        file.pair(name, 8, 6, 4, leaves, alpha=alpha)
    return save(file, path)


def square_file(path, *names):
    file = DialectFile("diffusers", {"diffusers"})
    for name in names:
        file.pair(name, 8, 8, 4, PEFT)
    return save(file, path)


UNKNOWN = ("transformer.strange_blocks.0.proj_in", "transformer.strange.mlp_2.fc")
FLAT = ("lora_transformer_strange_blocks_0_proj_in", "lora_transformer_strange_mlp_2_fc")


def test_flattening_needs_nothing_and_leaves_a_way_back(tmp_path):
    source = dotted_file(tmp_path / "in.safetensors", *UNKNOWN)
    flat, back = tmp_path / "flat.safetensors", tmp_path / "back.safetensors"
    run("convert", source, flat, "--to", "kohya")
    assert set(deltas(flat)) == set(FLAT)
    run("convert", flat, back, "--to", "diffusers")
    assert tensors_of(back) == tensors_of(source)


def test_norms_without_factors_find_their_way_back_too(tmp_path):
    source, flat = tmp_path / "in.safetensors", tmp_path / "flat.safetensors"
    file = DialectFile("comfyui", {"ComfyUI"})
    file.pair("diffusion_model.strange_blocks.0.q", 8, 6, 4, PEFT)
    file.tensors["diffusion_model.strange_blocks.0.norm.w_norm"] = file.draw(8)
    save(file, source)
    run("convert", source, flat, "--to", "kohya")
    run("convert", flat, tmp_path / "back.safetensors", "--to", "comfyui")
    assert tensors_of(tmp_path / "back.safetensors") == tensors_of(source)


def test_a_map_that_contradicts_the_names_is_not_believed(tmp_path):
    source = dotted_file(tmp_path / "in.safetensors", *UNKNOWN)
    flat = tmp_path / "flat.safetensors"
    run("convert", source, flat, "--to", "kohya")
    adapter = read_adapter(flat)
    lie = json.dumps({FLAT[0]: "transformer.other.place", FLAT[1]: UNKNOWN[1]})
    tensors = {t.key: t.load() for t in adapter.tensors()}
    save_file(
        {key: np.asarray(value) for key, value in tensors.items()},
        tmp_path / "lie.safetensors",
        {"loratools.module_map": lie},
    )
    text = refusal("convert", tmp_path / "lie.safetensors", tmp_path / "o", "--to", "diffusers")
    assert FLAT[0] in text


def test_names_that_nothing_resolves_are_listed(tmp_path):
    source = dotted_file(tmp_path / "in.safetensors", *FLAT, leaves=KOHYA, alpha=4.0)
    text = refusal("convert", source, tmp_path / "out.safetensors", "--to", "diffusers")
    assert "2 module names are not in any bundled table" in text
    assert all(name in text for name in FLAT)
    assert "`names_from`" in text
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("given", ["adapter", "checkpoint", "header", "index", "file of ours"])
def test_a_list_of_names_undoes_flattening(tmp_path, given):
    source = dotted_file(tmp_path / "in.safetensors", *FLAT, leaves=KOHYA, alpha=4.0)
    out, other = tmp_path / "out.safetensors", tmp_path / "other.safetensors"
    if given in ("checkpoint", "header", "index"):
        names = [name.removeprefix("transformer.") for name in UNKNOWN]
        save_file({f"{name}.weight": np.ones((1, 1)) for name in names}, other)
        if given == "header":
            data = other.read_bytes()
            other.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
        elif given == "index":
            other = tmp_path / "model.safetensors.index.json"
            shards = {f"{name}.weight": "model-1-of-1.safetensors" for name in names}
            other.write_text(json.dumps({"weight_map": shards}))
        options = ("--base", other, "--component", "transformer")
        text = refusal("convert", source, out, "--to", "diffusers", "--base", other)
        assert "`component`" in text
    else:
        dotted_file(other, *UNKNOWN, seed=2)
        if given == "file of ours":
            run("convert", other, tmp_path / "flat.safetensors", "--to", "kohya")
            other = tmp_path / "flat.safetensors"
        options = ("--names-from", other)
    run("convert", source, out, "--to", "diffusers", *options)
    found, expected = deltas(out), deltas(source)
    for flat, name in zip(FLAT, UNKNOWN, strict=True):
        np.testing.assert_allclose(found[name], expected[flat])


@pytest.mark.parametrize(
    ("flat", "component"),
    [
        ("lycoris_", "unet"), ("lycoris_", "transformer"), ("lora_transformer_", "transformer"),
        ("lora_prior_", "prior"), ("lora_decoder_", "decoder"), ("lora_te2_", "text_encoder_2"),
    ],
)  # fmt: skip
def test_every_flattened_prefix_has_a_way_back(tmp_path, flat, component):
    """SimpleTuner's prefix is that of UNets too, and OneTrainer has one for each part."""
    path = "strange_blocks.0.proj_in"
    source = dotted_file(tmp_path / "flat.safetensors", flat + flattened(path), leaves=KOHYA)
    names = dotted_file(tmp_path / "names.safetensors", f"{component}.{path}", seed=2)
    target = tmp_path / "dotted.safetensors"
    run("convert", source, target, "--to", "diffusers", "--names-from", names)
    assert set(read_adapter(target).modules) == {f"{component}.{path}"}


def test_an_original_checkpoint_names_comfyui_modules(tmp_path):
    source = dotted_file(tmp_path / "in.safetensors", "lora_unet_odd_blocks_0_q", leaves=KOHYA)
    base = tmp_path / "base.safetensors"
    save_file({"model.diffusion_model.odd_blocks.0.q.weight": np.ones((1, 1))}, base)
    out = tmp_path / "out.safetensors"
    run("convert", source, out, "--to", "comfyui", "--base", base)
    assert set(deltas(out)) == {"diffusion_model.odd_blocks.0.q"}


def test_names_that_fall_together_when_flattened_are_refused(tmp_path):
    names = ("transformer.a_b.c", "transformer.a.b_c")
    source = dotted_file(tmp_path / "in.safetensors", *names)
    text = refusal("convert", source, tmp_path / "out.safetensors", "--to", "kohya")
    assert "same when flattened" in text
    assert all(name in text for name in names)
    flat = dotted_file(tmp_path / "flat.safetensors", "lora_transformer_a_b_c", leaves=KOHYA)
    text = refusal(
        "convert", flat, tmp_path / "out.safetensors", "--to", "diffusers", "--names-from", source
    )
    assert "same when flattened" in text


def test_names_of_several_architectures_ask_which(tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    source = square_file(tmp_path / "in.safetensors", name)
    out = tmp_path / "out.safetensors"
    text = refusal("convert", source, out, "--to", "comfyui")
    assert all(table in text for table in ("flux1", "qwen_image", "chroma", "flux2"))
    run("convert", source, out, "--to", "comfyui", "--names", "qwen_image")
    assert set(deltas(out)) == {"diffusion_model.transformer_blocks.0.attn.to_q"}


def test_a_table_of_the_users(tmp_path):
    table = tmp_path / "mine.toml"
    table.write_text(
        """
        title = "Mine"
        diffusers = "transformer"
        kohya = "original"
        [[modules]]
        original = "block.{}."
        diffusers = "strange_blocks.{}."
        rows = [3, 1]
        pairs = [["both", "first", "second"]]
        """
    )
    file = DialectFile("diffusers", {"diffusers"}, seed=3)
    file.pair("transformer.strange_blocks.2.first", 6, 5, 2, PEFT)
    file.pair("transformer.strange_blocks.2.second", 2, 5, 1, PEFT)
    source = save(file, tmp_path / "in.safetensors")
    flat, back = tmp_path / "flat.safetensors", tmp_path / "back.safetensors"
    run("convert", source, flat, "--to", "kohya", "--names", table)
    (whole,) = deltas(flat).values()
    assert set(deltas(flat)) == {"lora_unet_block_2_both"}
    np.testing.assert_allclose(whole, np.concatenate(list(file.deltas.values())), atol=1e-12)
    run("convert", flat, back, "--to", "diffusers", "--names", table)
    assert tensors_of(back) == tensors_of(source)
    text = refusal("convert", GOLDEN / "kohya_sd15.safetensors", back, "--to", "diffusers",
                   "--names", table, "--overwrite")  # fmt: skip
    assert "not in the table of Mine" in text


def test_names_without_a_component_ask_for_one(tmp_path):
    source, out = GOLDEN / "mochi.safetensors", tmp_path / "out.safetensors"
    assert "`component`" in refusal("convert", source, out, "--to", "diffusers")
    run("convert", source, out, "--to", "diffusers", "--component", "transformer")
    assert set(deltas(out)) == {"transformer.transformer_blocks.0.attn1.to_q"}


def test_a_component_becomes_a_peft_folder_and_comes_back(tmp_path):
    source = GOLDEN / "diffusers_metadata.safetensors"
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert "`component`" in refusal("convert", source, folder, "--to", "peft")
    options = ("--to", "peft", "--component", "transformer")
    assert "another component" in refusal("convert", source, folder, *options)
    run("convert", source, folder, *options, "--allow-lossy")
    run("convert", folder, back, "--to", "diffusers", "--component", "transformer")
    expected = {n: d for n, d in deltas(source).items() if n.startswith("transformer.")}
    found = deltas(back)
    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert_equal_products(found[name], delta, 4)


def test_a_flattened_peft_adapter_remembers_its_names(make_folder, tmp_path):
    folder = make_folder(modules={"mid.0.q_proj": (12, 10, 4), "to_q": (6, 6, 4)}, r=4)
    flat, back = tmp_path / "flat.safetensors", tmp_path / "back"
    run("convert", folder, flat, "--to", "kohya", "--component", "unet")
    assert set(deltas(flat)) == {"lora_unet_mid_0_q_proj", "lora_unet_to_q"}
    run("convert", flat, back, "--to", "peft")
    found = deltas(back)
    assert set(found) == {"mid.0.q_proj", "to_q"}
    for name, delta in deltas(folder).items():
        assert_equal_products(found[name], delta, 4)


CROSSED = {
    "kohya_sd15": "Stable Diffusion 1.x",
    "kohya_sdxl": "Stable Diffusion XL",
    "kohya_flux": "FLUX.1",
    "musubi_wan": "Wan 2.x",
}


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("target", ["diffusers", "comfyui"])
def test_there_and_back_is_the_same_bytes(tmp_path, name, target):
    source = GOLDEN / f"{name}.safetensors"
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    said = run("convert", source, there, "--to", target, "--keep-alpha")
    (note,) = (line for line in said.splitlines() if "names by the table of" in line)
    assert CROSSED[name] in note
    run("convert", there, back, "--to", "kohya", "--keep-alpha")
    before, after = tensors_of(source), tensors_of(back)
    # A module without alpha gets one, which says the same.
    assert {k: v for k, v in after.items() if k in before} == before
    assert all(key.endswith(".alpha") for key in set(after) - set(before))


def test_of_two_experts_other_namings_take_the_one_asked_for(tmp_path):
    names = ["transformer.blocks.0.attn1.to_q", "transformer_2.blocks.0.attn1.to_q"]
    source = square_file(tmp_path / "in.safetensors", *names)
    out = tmp_path / "out.safetensors"
    text = refusal("convert", source, out, "--to", "comfyui")
    assert "transformer, transformer_2" in text
    assert "`component`" in text
    options = ("--to", "comfyui", "--component", "transformer_2")
    assert "is of another component" in refusal("convert", source, out, *options)
    assert not out.exists()
    run("convert", source, out, *options, "--allow-lossy")
    (found,) = deltas(out).values()
    np.testing.assert_allclose(found, deltas(source)[names[1]])


def test_paths_of_one_expert_may_lack_their_component(tmp_path):
    """fal's files have some modules below `transformer.` and some below nothing."""
    file = DialectFile("mixed", {"safetensors"}, seed=4)
    file.pair("transformer.transformer_blocks.0.attn.to_q", 16, 16, 2, PEFT)
    file.pair("single_transformer_blocks.0.attn.to_q", 16, 16, 2, PEFT)
    source, target = save(file, tmp_path / "mixed.safetensors"), tmp_path / "kohya.safetensors"
    run("convert", source, target, "--to", "kohya")
    assert set(read_adapter(target).modules) == {
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1",
    }  # fmt: skip


def test_comfyui_files_may_have_the_paths_of_diffusers(tmp_path):
    """ai-toolkit saves Z-Image so, with q, k and v apart."""
    file = DialectFile("ai-toolkit", {"comfyui"}, seed=4)
    for part in "qkv":
        file.pair(f"diffusion_model.layers.0.attention.to_{part}", 16, 16, 2, PEFT)
    source = save(file, tmp_path / "ai-toolkit.safetensors")
    diffusers, kohya = tmp_path / "diffusers.safetensors", tmp_path / "kohya.safetensors"
    run("convert", source, diffusers, "--to", "diffusers")
    found = read_adapter(diffusers).modules
    assert set(found) == {f"transformer.layers.0.attention.to_{part}" for part in "qkv"}
    run("convert", source, kohya, "--to", "kohya")
    (fused,) = read_adapter(kohya).modules.items()
    assert fused[0] == "lora_unet_layers_0_attention_qkv"
    parts = [dense(found[f"transformer.layers.0.attention.to_{part}"]) for part in "qkv"]
    np.testing.assert_array_equal(dense(fused[1]), np.concatenate(parts))


def test_parts_of_different_scales_are_fused_by_their_changes(tmp_path):
    """Alphas differ, and by no power of two: 16 bits would round in silence."""
    file = DialectFile("diffusers", {"diffusers"}, seed=4)
    block = "transformer.transformer_blocks.0.attn"
    for part, alpha in (("to_q", 2.0), ("to_k", 3.0), ("to_v", 5.0)):
        file.pair(f"{block}.{part}", 16, 16, 4, KOHYA, alpha=alpha)
    source, target = save(file, tmp_path / "apart.safetensors"), tmp_path / "kohya.safetensors"
    run("convert", source, target, "--to", "kohya", "--names", "flux1")
    changes = deltas(source)
    parts = [changes[f"{block}.to_{part}"] for part in "qkv"]
    (fused,) = deltas(target).values()
    np.testing.assert_allclose(fused, np.concatenate(parts), rtol=0, atol=1e-6)


def test_biases_of_factors_are_scaled_where_they_stand_alone(tmp_path):
    """PEFT scales a bias with the factors that it belongs to; ComfyUI adds `diff_b` as it is."""
    file = DialectFile("diffusers", {"diffusers"}, seed=4)
    name = "transformer.transformer_blocks.0.attn.to_out.0"
    file.pair(name, 16, 16, 4, PEFT, alpha=3.0)
    bias = file.draw(16)
    file.tensors[f"{name}.lora_B.bias"] = bias
    source, target = save(file, tmp_path / "bias.safetensors"), tmp_path / "comfyui.safetensors"
    run("convert", source, target, "--to", "comfyui", "--names", "flux1")
    found = tensors_of(target)["diffusion_model.double_blocks.0.img_attn.proj.diff_b"]
    assert found == ("F32", [16], (bias.astype(np.float32) * np.float32(0.75)).tobytes())


def test_xlabs_blocks_are_rows_of_flux_modules(tmp_path):
    source, out = GOLDEN / "xlabs.safetensors", tmp_path / "out.safetensors"
    run("convert", source, out, "--to", "comfyui")
    before, after = deltas(source), deltas(out)
    block = "diffusion_model.single_blocks.0"
    linear1 = after[f"{block}.linear1"]
    np.testing.assert_allclose(linear1[:24], before["single_blocks.0.processor.qkv_lora"])
    assert not linear1[24:].any()
    assert linear1.shape == (56, 8)
    for number, stream in (("1", "img"), ("2", "txt")):
        for theirs, mine in (("qkv", "qkv"), ("proj", "proj")):
            np.testing.assert_allclose(
                after[f"diffusion_model.double_blocks.0.{stream}_attn.{mine}"],
                before[f"double_blocks.0.processor.{theirs}_lora{number}"],
            )


def test_control_adapters_become_comfyuis(tmp_path):
    """As ComfyUI itself converts them: biases, norms and the widened input have keys there."""
    source, out = GOLDEN / "bfl_control.safetensors", tmp_path / "out.safetensors"
    run("convert", source, out, "--to", "comfyui")
    expected = {
        "diffusion_model."
        + key.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.scale.set_weight")
        for key in tensors_of(source)
    }
    tensors = tensors_of(out)
    assert set(tensors) == expected | {"diffusion_model.img_in.reshape_weight"}
    assert read_adapter(out).carried["diffusion_model.img_in.reshape_weight"].load().tolist() == [
        8,
        16,
    ]
    norm = "diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"
    (replacement,) = read_adapter(out).replacements.values()
    assert replacement.target == norm


def test_paths_of_clip_have_their_outer_module_again(tmp_path):
    """transformers 5 dropped `text_model`, which loaders of kohya's files ask for."""
    path = "encoder.layers.0.self_attn.q_proj"
    source = dotted_file(tmp_path / "in.safetensors", f"text_encoder.{path}")
    flat, back = tmp_path / "flat.safetensors", tmp_path / "back.safetensors"
    run("convert", source, flat, "--to", "kohya", "--names", "sd1")
    assert set(deltas(flat)) == {"lora_te_text_model_encoder_layers_0_self_attn_q_proj"}
    run("convert", flat, back, "--to", "diffusers", "--names", "sd1")
    assert set(deltas(back)) == {f"text_encoder.text_model.{path}"}


@pytest.mark.parametrize("pair", [("kohya", "diffusers"), ("diffusers", "comfyui")])
def test_merging_across_dialects_goes_through_one_naming(tmp_path, pair):
    kohya = GOLDEN / "kohya_flux.safetensors"
    paths = {"kohya": kohya}
    for name in ("diffusers", "comfyui"):
        paths[name] = tmp_path / f"{name}.safetensors"
        run("convert", kohya, paths[name], "--to", name)
    out = tmp_path / "out.safetensors"
    run("merge", f"{paths[pair[0]]}:0.75", f"{paths[pair[1]]}:-0.25", "-o", out, "--dtype", "f32")
    found, expected = deltas(out), deltas(paths[pair[0]])
    assert set(found) == set(expected)
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name], 0.5 * delta, atol=1e-6)


def test_merging_stops_where_only_a_text_encoder_is_shared(tmp_path):
    """Adapters of FLUX and SDXL both have CLIP's, and add up to nothing that any model has."""
    clip = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    flux, xl = "lora_unet_double_blocks_0_img_mlp_0", "lora_unet_input_blocks_4_1_proj_in"
    paths = [
        dotted_file(tmp_path / f"{index}.safetensors", clip, name, leaves=KOHYA)
        for index, name in enumerate((flux, xl))
    ]
    message = refusal("merge", *paths, "-o", tmp_path / "out.safetensors")
    assert "shares no module of a component" in message
    only = dotted_file(tmp_path / "only.safetensors", clip, leaves=KOHYA)
    run("merge", paths[0], only, "-o", tmp_path / "out.safetensors")
    assert set(read_adapter(tmp_path / "out.safetensors").modules) == {clip, flux}


def test_merging_stops_where_names_do_not_meet(tmp_path):
    first = GOLDEN / "kohya_sd15.safetensors"
    for other in ("kohya_flux", "mochi", "comfyui"):
        out = tmp_path / "out.safetensors"
        text = refusal("merge", first, GOLDEN / f"{other}.safetensors", "-o", out, "--force-base")
        assert "shares no module" in text or "convert" in text
        assert not out.exists()


@pytest.mark.parametrize("name", [maker.__name__ for maker in MAKERS])
def test_no_conversion_loses_anything_in_silence(tmp_path, name):
    """Every module, addition and replacement is in the output, or the conversion was refused."""
    source = GOLDEN / f"{name}.safetensors"
    before = read_adapter(source)
    for target in ("kohya", "diffusers", "comfyui"):
        out = tmp_path / f"{target}.safetensors"
        done = CliRunner().invoke(cli, ["convert", str(source), str(out), "--to", target])
        if done.exit_code != 0:
            assert not out.exists()
            continue
        after = read_adapter(out)
        weight = Known(np.random.default_rng(0).standard_normal((8, 6)))
        norm = sum(np.linalg.norm(dense(d, weight)) ** 2 for d in before.modules.values())
        kept = sum(np.linalg.norm(dense(d, weight)) ** 2 for d in after.modules.values())
        assert kept == pytest.approx(norm, rel=1e-9)
        biases = sum(d.direction.bias is not None for d in before.modules.values())
        assert len(after.additions) in (len(before.additions), len(before.additions) + biases)
        assert len(after.replacements) == len(before.replacements)
