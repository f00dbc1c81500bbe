"""Tables of names against diffusers: its modules on the one side, its converters on the other."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from dialect_files import KOHYA, PEFT, DialectFile, save
from neighbours import built_classes, weights
from safetensors.numpy import save_file
from test_dialects import tensors_of
from test_resolution import deltas, refusal, run

from loratools.naming.choice import (
    architectures_without_a_table,
    chosen_tables,
)
from loratools.naming.named_modules import NamedModules
from loratools.naming.tables import bundled_tables, filled, find_table, flattened
from loratools_formats.disk.errors import OptionError

SD1 = {
    "block_out_channels": (32, 32, 32, 32),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
SDXL = {
    "block_out_channels": (32, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
    "use_linear_projection": True,
}
MODELS = {
    "sd1": ("UNet2DConditionModel", SD1),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "flux1": (
        "FluxTransformer2DModel",
        {"num_layers": 12, "num_single_layers": 2, "guidance_embeds": True},
    ),
    "wan2": (
        "WanTransformer3DModel",
        {"num_layers": 11, "image_dim": 16, "added_kv_proj_dim": 16},
    ),
    "qwen_image": ("QwenImageTransformer2DModel", {"num_layers": 2}),
    "z_image": ("ZImageTransformer2DModel", {"n_layers": 2, "n_refiner_layers": 2}),
    "auraflow": ("AuraFlowTransformer2DModel", {}),
    "chroma": ("ChromaTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "cosmos2": ("CosmosTransformer3DModel", {"num_layers": 2}),
    "flux2": ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {"num_layers": 2, "num_single_layers": 2}),
    "krea2": ("Krea2Transformer2DModel", {"num_layers": 2}),
    "ltx2": ("LTX2VideoTransformer3DModel", {"num_layers": 2}),
    "ltx_video": ("LTXVideoTransformer3DModel", {"num_layers": 2}),
    "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2}),
    "sd3": ("SD3Transformer2DModel", {"num_layers": 3, "dual_attention_layers": (0,)}),
    "ace_step15": ("AceStepTransformer1DModel", {"num_hidden_layers": 2}),
    "hidream": (
        "HiDreamImageTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2,
         "attention_head_dim": 8, "patch_size": 2, "in_channels": 4, "caption_channels": [16, 16],
         "text_emb_dim": 16, "num_routed_experts": 2, "axes_dims_rope": (4, 2, 2),
         "llama_layers": [0, 1]},
    ),
    "hunyuan_image": (
        "HunyuanImageTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "text_embed_2_dim": 16, "guidance_embeds": True,
         "use_meanflow": True},
    ),
    "hunyuan_video15": ("HunyuanVideo15Transformer3DModel", {"num_layers": 2}),
    "ideogram4": ("Ideogram4Transformer2DModel", {}),
    "qwen_image21": ("QwenImage21Transformer2DModel", {"num_layers": 2}),
    "wan_animate2": ("WanAnimate2Transformer3DModel", {"num_layers": 2}),
}  # fmt: skip
WITHOUT_CONVERTER = (
    "qwen_image", "ace_step15", "hunyuan_image", "hunyuan_video15", "ideogram4"
)  # fmt: skip
"""Both namings of Qwen-Image are one; the wheel of diffusers has no converter of the others."""


@pytest.fixture(scope="module")
def model_modules():
    """Return a function that lists the linear and convolutional modules of a model."""
    import diffusers
    import torch

    made = {}

    def modules(name):
        if name not in made:
            kind, config = MODELS[name]
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # diffusers' own
                model = getattr(diffusers, kind)(**config)
            kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
            made[name] = {
                path: tuple(module.weight.shape)
                for path, module in model.named_modules()
                if isinstance(module, kinds)
                # Its table has the layers, which LoRAs change, and nothing around them.
                and (name != "ideogram4" or path.startswith("layers."))
            }
        return made[name]

    return modules


def original_of(table, path, shape):
    """Return where a module stands, its original name, and its shapes here and there."""
    linear = shape if len(shape) == 2 else (None, None)
    place = table.locate(path, flat=False, schemes=("diffusers",), shape=linear)
    assert place is not None, path
    (part,) = place.covered
    parts = place.row.parts
    whole = (shape[0] * sum(parts) // parts[part], shape[1]) if len(shape) == 2 else (None, None)
    return place, filled(place.row.original, place.numbers), linear, whole


def test_every_table_is_tested():
    assert {table.name for table in bundled_tables()} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_of_the_model_has_a_name_and_a_way_back(name, model_modules):
    table = find_table(name)
    reached = {}
    for path, shape in model_modules(name).items():
        place, original, own, whole = original_of(table, path, shape)
        (part,) = place.covered
        assert (original, part) not in reached
        reached[original, part] = path
        for flat in (False, True):
            spelled = flattened(original) if flat else original
            back = table.locate(spelled, flat=flat, schemes=("original",), shape=whole)
            assert filled(back.row.diffusers[part], back.numbers) == path
            spelled = flattened(path) if flat else path
            again = table.locate(spelled, flat=flat, schemes=("diffusers",), shape=own)
            assert again == place
            trained = place.row.trained
            if trained:
                one_by_one = len(trained) > 1
                spelled = filled(trained[part if one_by_one else 0], place.numbers)
                again = table.locate(
                    flattened(spelled) if flat else spelled,
                    flat=flat,
                    schemes=("trained",),
                    shape=own if one_by_one else whole,
                )
                assert (again.row, again.numbers) == (place.row, place.numbers)
                assert part in again.covered


@pytest.mark.parametrize(
    ("name", "trained", "comfyui", "diffusers"),
    [
        # by scripts/convert_hunyuan_image_to_diffusers.py of diffusers, and ComfyUI's loader
        ("hunyuan_image", "double_blocks.1.txt_mlp.fc1", "double_blocks.1.txt_mlp.0",
         ["transformer_blocks.1.ff_context.net.0.proj"]),
        ("hunyuan_image", "double_blocks.0.img_mod.linear", "double_blocks.0.img_mod.lin",
         ["transformer_blocks.0.norm1.linear"]),
        ("hunyuan_image", "single_blocks.7.linear1", "single_blocks.7.linear1",
         [f"single_transformer_blocks.7.{name}"
          for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]),
        ("hunyuan_image", "txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer",
         ["context_embedder.time_text_embed.text_embedder.linear_1"]),
        # by scripts/convert_hunyuan_video1_5_to_diffusers.py, and musubi-tuner's converter
        ("hunyuan_video15", "double_blocks.1.txt_attn_k", "double_blocks.1.txt_attn_qkv",
         ["transformer_blocks.1.attn.add_k_proj"]),
    ],
)  # fmt: skip
def test_trainers_comfyuis_and_diffusers_names(tmp_path, name, trained, comfyui, diffusers):
    ratio = {"txt_mlp": 4, "img_mod": 6, "linear1": 7, "txt_attn_k": 1}
    height = next((8 * n for part, n in ratio.items() if part in trained), 8)
    file = DialectFile("kohya", {"kohya"}, seed=4)
    own = f"lora_unet_{flattened(trained)}"
    file.pair(own, height, 8, 2, KOHYA, alpha=2.0)
    source = save(file, tmp_path / "kohya.safetensors")
    outputs = {to: tmp_path / f"{to}.safetensors" for to in ("comfyui", "diffusers")}
    back = tmp_path / "back.safetensors"
    for to in ("comfyui", "diffusers"):
        run("convert", source, outputs[to], "--to", to, "--names", name)
    (whole,), (wanted,) = deltas(outputs["comfyui"]).values(), deltas(source).values()
    assert list(deltas(outputs["comfyui"])) == [f"diffusion_model.{comfyui}"]
    found = deltas(outputs["diffusers"])
    paths = [f"transformer.{path}" for path in diffusers]
    assert set(found) == set(paths)
    np.testing.assert_array_equal(np.concatenate([found[path] for path in paths]), wanted)
    rows = whole if len(whole) == len(wanted) else whole[len(wanted) : 2 * len(wanted)]  # of k
    np.testing.assert_array_equal(rows, wanted)
    run("convert", outputs["comfyui"], back, "--to", "kohya", "--names", name)
    if find_table(name).kohya == "original":
        own = f"lora_unet_{flattened(comfyui)}"
    np.testing.assert_array_equal(deltas(back)[own], wanted)


@pytest.mark.parametrize(("name", "encoder"), [("cosmos2", "qwen3_06b"), ("lumina2", "gemma2_2b")])
def test_text_encoders_whose_trainers_name_the_inner_model(tmp_path, name, encoder):
    """By sd-scripts' converter of Anima: ComfyUI alone has `model.` before the paths."""
    path = "layers.3.self_attn.q_proj"
    file = DialectFile("kohya", {"kohya"}, seed=4)
    own = f"lora_te_{flattened(path)}"
    file.pair(own, 16, 8, 2, KOHYA, alpha=2.0)
    source = save(file, tmp_path / "kohya.safetensors")
    wanted = {
        "comfyui": f"text_encoders.{encoder}.transformer.model.{path}",
        "diffusers": f"text_encoder.{path}",
    }
    for to, expected in wanted.items():
        out, back = tmp_path / f"{to}.safetensors", tmp_path / f"{to}-back.safetensors"
        run("convert", source, out, "--to", to, "--names", name)
        assert list(deltas(out)) == [expected]
        run("convert", out, back, "--to", "kohya", "--names", name)
        np.testing.assert_array_equal(deltas(back)[own], deltas(source)[own])


def test_the_second_expert_of_wan_goes_there_and_back(model_modules, tmp_path):
    """Its modules are the first one's; files of other namings hold one expert, named alike."""
    file = DialectFile("diffusers", {"diffusers"})
    for path in model_modules("wan2"):
        file.pair(f"transformer_2.{path}", 4, 4, 1, PEFT)
    source = save(file, tmp_path / "in.safetensors")
    for naming in ("kohya", "comfyui"):
        there, back = tmp_path / f"{naming}.safetensors", tmp_path / f"{naming}.back.safetensors"
        run("convert", source, there, "--to", naming)
        assert not any("transformer" in name for name in tensors_of(there))
        run("convert", there, back, "--to", "diffusers", "--component", "transformer_2")
        assert tensors_of(back) == tensors_of(source)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in WITHOUT_CONVERTER])
def test_original_names_are_those_that_diffusers_converts(name, model_modules):
    """Give diffusers a checkpoint of our original names; its converter must make all modules."""
    import torch
    from diffusers.loaders import single_file_utils as converters

    table, modules = find_table(name), model_modules(name)
    heights, columns = {}, {}
    for path, shape in modules.items():
        place, original, *_ = original_of(table, path, shape)
        heights.setdefault(original, {})[place.covered[0]] = shape[0]
        columns[original] = shape[1:]
    mark = {original: number for number, original in enumerate(sorted(heights))}
    checkpoint = {}
    for original, parts in heights.items():
        # Small in all but the first dimension; each row says where it is.
        rows = sum(parts.values())
        weight = torch.arange(rows).double().reshape(-1, 1) + 1e6 * mark[original]
        if name in ("sd3", "lumina2"):  # whose converters look at the columns
            weight = weight.expand(-1, columns[original][0])
        checkpoint[f"{original}.weight"] = weight
    converted = _converted(converters, name, checkpoint)
    for path, shape in modules.items():
        place, original, *_ = original_of(table, path, shape)
        (part,) = place.covered
        start = sum(height for p, height in heights[original].items() if p < part)
        expected = torch.arange(start, start + shape[0])
        if place.row.swapped_halves:
            expected = torch.cat([expected[shape[0] // 2 :], expected[: shape[0] // 2]])
        found = converted[f"{path}.weight"].reshape(shape[0], -1)[:, 0] - 1e6 * mark[original]
        assert torch.equal(found.long(), expected), path


def _converted(converters, name, checkpoint):
    import torch

    prefix = "model.diffusion_model."
    full = {prefix + key: tensor for key, tensor in checkpoint.items()}
    if name in ("sd1", "sdxl"):
        config = {
            "layers_per_block": 2,
            "class_embed_type": None,
            "addition_embed_type": MODELS[name][1].get("addition_embed_type"),
        }
        for norm in ("out.0",):
            full[f"{prefix}{norm}.weight"] = torch.zeros(1)
        for key in list(full):
            full[key.removesuffix(".weight") + ".bias"] = torch.zeros(1)
        return converters.convert_ldm_unet_checkpoint(full, config)
    if name == "flux1":
        return _flux1(converters, {k.removeprefix(prefix): v for k, v in full.items()})
    if name in ("sd3", "chroma"):
        return _with_biases(converters, name, {k.removeprefix(prefix): v for k, v in full.items()})
    convert = {
        "auraflow": converters.convert_auraflow_transformer_checkpoint_to_diffusers,
        "cosmos2": converters.convert_cosmos_transformer_checkpoint_to_diffusers,
        "flux2": converters.convert_flux2_transformer_checkpoint_to_diffusers,
        "hunyuan_video": converters.convert_hunyuan_video_transformer_to_diffusers,
        "krea2": converters.convert_krea2_transformer_checkpoint_to_diffusers,
        "ltx2": converters.convert_ltx2_transformer_to_diffusers,
        "ltx_video": converters.convert_ltx_transformer_checkpoint_to_diffusers,
        "lumina2": converters.convert_lumina2_to_diffusers,
        "hidream": converters.convert_hidream_transformer_to_diffusers,
        "qwen_image21": converters.convert_qwen_image21_transformer_checkpoint_to_diffusers,
        "wan2": converters.convert_wan_transformer_to_diffusers,
        "wan_animate2": converters.convert_wan_animate_2_transformer_to_diffusers,
        "z_image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    }[name]
    if name in ("auraflow", "hunyuan_video", "flux2", "cosmos2", "lumina2"):
        full = {key.removeprefix(prefix): tensor for key, tensor in full.items()}
    if name == "auraflow":
        for key in ("register_tokens", "positional_encoding", "init_x_linear.bias"):
            full[key] = torch.zeros(1)
    return convert(full)


def _with_biases(converters, name, full):
    import torch

    for key in list(full):
        full[key.removesuffix(".weight") + ".bias"] = full[key][:, 0]
        block, _, last = key.removesuffix(".weight").rpartition(".")
        if name == "chroma" and last in ("qkv", "linear1"):
            for norm in ("query_norm", "key_norm"):
                full[f"{block}.norm.{norm}.scale"] = torch.zeros(1)
        if name == "chroma" and last == "in_layer":
            number = block.rpartition(".")[2]
            full[f"distilled_guidance_layer.norms.{number}.scale"] = torch.zeros(1)
    if name == "chroma":
        return converters.convert_chroma_transformer_checkpoint_to_diffusers(full)
    full["pos_embed"] = torch.zeros(1)
    return converters.convert_sd3_transformer_checkpoint_to_diffusers(full)


def _flux1(converters, full):
    import torch

    for key in list(full):
        full[key.removesuffix(".weight") + ".bias"] = torch.zeros(full[key].shape[0])
        block, _, last = key.removesuffix(".weight").rpartition(".")
        if last in ("qkv", "linear1"):
            for norm in ("query_norm", "key_norm"):
                full[f"{block}.norm.{norm}.scale"] = torch.zeros(1)
    return converters.convert_flux_transformer_checkpoint_to_diffusers(full)


@pytest.mark.parametrize("name", ["ideogram4", "ace_step15"])
def test_loras_get_the_names_that_diffusers_gives_them(name, model_modules, tmp_path):
    from diffusers.loaders import lora_conversion_utils as loras

    convert = {
        "ideogram4": loras._convert_non_diffusers_ideogram4_lora_to_diffusers,
        "ace_step15": loras._convert_non_diffusers_ace_step_lora_to_diffusers,
    }[name]
    import torch

    table, generator = find_table(name), np.random.default_rng(0)
    originals = {
        original_of(table, path, shape)[1]
        for path, shape in model_modules(name).items()
        if path.startswith("layers.")
    }
    tensors = {
        f"diffusion_model.{original}.{leaf}.weight": generator.standard_normal(shape).astype("f4")
        for original in sorted(originals)
        for leaf, shape in (("lora_A", (1, 4)), ("lora_B", (12 if "qkv" in original else 6, 1)))
    }
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(tensors, source)
    run("convert", source, output, "--to", "diffusers", "--names", name)
    trained = {"ideogram4": "diffusion_model.", "ace_step15": "base_model.model."}[name]
    prefix = {"ideogram4": "diffusion_model.", "ace_step15": "diffusion_model.decoder."}[name]
    given = {key.replace(prefix, trained): torch.from_numpy(t) for key, t in tensors.items()}
    wanted = convert(given)
    found = tensors_of(output)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key][2] == tensor.numpy().tobytes(), key


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya"])
def test_an_original_path_that_begins_as_a_component_is_found(target, tmp_path):
    """ACE-Step's own names begin with `decoder.`, which is a component of Stable Cascade."""
    tensors = {
        f"decoder.layers.{layer}.self_attn.{module}.{leaf}.weight": np.full(shape, 0.5, "f4")
        for layer in range(2)
        for module in ("q_proj", "o_proj")
        for leaf, shape in (("lora_A", (1, 4)), ("lora_B", (6, 1)))
    }
    own, usual = tmp_path / "own.safetensors", tmp_path / "usual.safetensors"
    save_file(tensors, own)
    save_file({f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}, usual)
    for source in (own, usual):
        run("convert", source, tmp_path / f"{source.stem}-out.safetensors", "--to", target)
    found, wanted = (tensors_of(tmp_path / f"{name}-out.safetensors") for name in ("own", "usual"))
    assert found == wanted
    assert not any(key.startswith(("decoder.", "lora_decoder_")) for key in found)


def test_wan_animate_is_in_the_table_of_wan():
    import diffusers
    import torch
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers as convert

    with torch.device("meta"):
        model = diffusers.WanAnimateTransformer3DModel(num_layers=5)
    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    table, checkpoint = find_table("wan2"), {}
    shapes = {p: m.weight.shape for p, m in model.named_modules() if isinstance(m, kinds)}
    rows = {}
    for path, shape in shapes.items():
        linear = tuple(shape) if len(shape) == 2 else (None, None)
        place = table.locate(path, flat=False, schemes=("diffusers",), shape=linear)
        assert place is not None, path
        rows.setdefault(filled(place.row.original, place.numbers), {})[place.covered[0]] = path
    for number, (original, parts) in enumerate(rows.items()):
        pieces = [
            torch.full((shapes[path][0], 1), 100.0 * number + part)
            for part, path in sorted(parts.items())
        ]
        checkpoint[f"{original}.weight"] = torch.cat(pieces)
    converted = convert(dict(checkpoint))
    for number, parts in enumerate(rows.values()):
        for part, path in parts.items():
            values = converted[f"{path}.weight"]
            assert values.shape[0] == shapes[path][0], path
            assert (values == 100.0 * number + part).all(), path


@pytest.mark.parametrize("part", ["attention", "mlp", "all"])
def test_no_model_of_diffusers_gets_the_names_of_another(models, part, tmp_path):
    """Every transformer and UNet that builds without arguments, its blocks all there."""
    from diffusers.models import transformers

    tables = {kind: table for table in bundled_tables() for kind in table.classes}
    wrong = []
    for kind, shapes in models.items():
        chosen = {path: shape for path, shape in shapes.items() if is_of(part, path)}
        component = "transformer" if hasattr(transformers, kind) else "unet"
        names = {f"{component}.{path}": f"{component}.{path}" for path in chosen}
        sides = dict(zip(names, chosen.values(), strict=True))
        linear = {name: shape for name, shape in sides.items() if len(shape) == 2}
        file = NamedModules(names, linear, {})
        try:
            found = chosen_tables([file], "comfyui") if names else []
        except OptionError:
            continue
        own = tables.get(kind)
        if own is None and found and component == "transformer":
            wrong.append((kind, [table.name for table in found]))
        if own is not None and found and own not in found:
            wrong.append((kind, [table.name for table in found]))
    assert not wrong


def is_of(part, path):
    is_attention = any(word in path for word in ("attn", "attention"))
    is_mlp = any(word in path for word in ("ff", "mlp", "feed_forward"))
    return {"attention": is_attention, "mlp": is_mlp, "all": True}[part]


def test_architectures_without_a_table_are_known(models):
    """The names that the tables compete with are those of the installed diffusers."""
    tables = {kind for table in bundled_tables() for kind in table.classes}
    listed = {table.name: table for table in architectures_without_a_table()}
    from diffusers.models import transformers

    for kind, shapes in models.items():
        if not hasattr(transformers, kind) or kind in tables:
            continue
        for path in shapes:
            place = listed[kind].locate(path, flat=False, schemes=("diffusers",))
            assert place is not None, (kind, path)


@pytest.fixture(scope="module")
def models():
    """Return the shapes of the weights of every model that builds without arguments."""
    from diffusers.models import transformers, unets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own
        built = built_classes(transformers) | built_classes(unets)
    return {kind: weights(model) for kind, model in built.items()}


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({"ss_base_model_version": "lumina2"}, ["lumina2"]),
        ({"modelspec.architecture": "stable-diffusion-v3-5-large/lora"}, ["sd3"]),
        ({"ss_base_model_version": "flux2_klein_9b"}, ["flux2"]),
        (
            {"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"},
            ["flux1"],
        ),
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}, ["sdxl"]),
        ({"ss_base_model_version": "sd_v1"}, ["sd1"]),
        ({"ss_base_model_version": "qwen_image_edit_2509"}, ["qwen_image"]),
        ({"ss_base_model_version": "wan2.1"}, ["wan2"]),
        ({"ss_base_model_version": "zimage:turbo"}, ["z_image"]),
        ({"ss_base_model_version": "chroma"}, ["chroma"]),
        ({"ss_base_model_version": "ltx2"}, ["ltx2"]),
        ({"ss_base_model_version": "ltxv"}, ["ltx_video"]),
        ({"ss_base_model_version": "hunyuan_video"}, ["hunyuan_video"]),
        ({"modelspec.architecture": "anima"}, ["cosmos2"]),
        ({"ss_base_model_version": "ponyv7"}, ["auraflow"]),
        ({"ss_base_model_version": "pony"}, ["sdxl"]),
        ({"ss_base_model_version": "krea2"}, ["krea2"]),
        ({"ss_base_model_version": "sd_v2_768_v"}, ["sd1"]),
        ({"ss_base_model_version": "hunyuan_video_1_5"}, ["hunyuan_video15"]),
        ({"modelspec.architecture": "hunyuan-image-2.1"}, ["hunyuan_image"]),
        ({"modelspec.architecture": "hidream-i1"}, ["hidream"]),
        ({"ss_base_model_version": "qwen_image_2.1"}, ["qwen_image21"]),
        ({"ss_base_model_version": "wan2.2_animate"}, ["wan2"]),
        ({"ss_base_model_version": "wan-animate-2"}, ["wan_animate2"]),
        ({"ss_base_model_version": "ideogram4"}, ["ideogram4"]),
        ({"ss_base_model_version": "kolors"}, ["sdxl"]),
        ({"ss_base_model_version": "acestep-v15-turbo"}, ["ace_step15"]),
    ],
)
def test_what_metadata_calls_an_architecture(said, names):
    assert [t.name for t in bundled_tables() if all(map(t.is_known_as, said_texts(said)))] == names


def said_texts(metadata):
    return [text for key, text in metadata.items() if key != "ss_v2"]


@pytest.mark.parametrize("said", ["kandinsky-5/lora", "flux1", "lumina2"])
def test_metadata_of_another_architecture_is_a_refusal(tmp_path, said):
    file = DialectFile("diffusers", {"diffusers"})
    file.pair("transformer.blocks.0.attn1.to_q", 8, 8, 2, PEFT)
    file.metadata = {"modelspec.architecture": said}
    source = save(file, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    text = refusal("convert", source, out, "--to", "comfyui")
    assert said in text
    assert not out.exists()
    run("convert", source, out, "--to", "comfyui", "--names", "wan2")
    assert {n.rpartition(".lora")[0] for n in tensors_of(out)} == {
        "diffusion_model.blocks.0.self_attn.q"
    }


@pytest.mark.parametrize("names", [(), ("--names", "z_image")])
def test_rows_that_are_no_thirds_are_not_cut_in_thirds(tmp_path, names):
    """Lumina 2 has fewer heads of keys and values than of queries."""
    file = DialectFile("kohya", {"kohya"})
    file.pair("lora_unet_layers_0_attention_qkv", 40, 24, 2, KOHYA, alpha=2.0)
    source = save(file, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    if names:
        assert "proportions" in refusal("convert", source, out, "--to", "diffusers", *names)
        return
    run("convert", source, out, "--to", "diffusers")
    heights = {n: shape[0] for n, (_, shape, _) in tensors_of(out).items() if "lora_B" in n}
    block = "transformer.layers.0.attn"
    parts = {"q": 24, "k": 8, "v": 8}
    assert heights == {f"{block}.to_{part}.lora_B.weight": n for part, n in parts.items()}


def test_the_last_block_of_sd3_has_its_halves_swapped(tmp_path):
    """Its context has a norm of shift and scale, told by its shape."""
    file = DialectFile("comfyui", {"comfyui"})
    block = "joint_blocks.23.context_block.adaLN_modulation.1"
    file.pair(f"diffusion_model.{block}", 16, 8, 2, PEFT)
    file.pair(f"diffusion_model.{block.replace('23', '22')}", 48, 8, 2, PEFT)
    source = save(file, tmp_path / "in.safetensors")
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    run("convert", source, out, "--to", "diffusers")
    before, after = deltas(source), deltas(out)
    last = before[f"diffusion_model.{block}"]
    np.testing.assert_array_equal(
        after["transformer.transformer_blocks.23.norm1_context.linear"],
        np.concatenate([last[8:], last[:8]]),
    )
    np.testing.assert_array_equal(
        after["transformer.transformer_blocks.22.norm1_context.linear"],
        before[f"diffusion_model.{block.replace('23', '22')}"],
    )
    run("convert", out, back, "--to", "comfyui")
    assert tensors_of(back) == tensors_of(source)


def test_a_table_of_another_form_is_refused(tmp_path):
    path = tmp_path / "map.toml"
    for text in (
        "not toml",
        'title = "x"',
        'title="x"\ndiffusers="unet"\nkohya="original"\nmodules=[{pairs=[["a"]]}]',
    ):
        path.write_text(text)
        with pytest.raises(OptionError):
            find_table(str(path))
    with pytest.raises(OptionError, match="sdxl"):
        find_table("nonsense")


SOUND = {
    "title": '"Mine"',
    "diffusers": '"unet"',
    "kohya": '"original"',
    "modules": '[{original = "a.", diffusers = "b.", pairs = [["c", "d"]]}]',
}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "kohya",
            '"weird"',
            ["kohya is wrong", "got 'weird'", "expected original, trained or diffusers"],
        ),
        ("title", "3", ["title is wrong", "got 3", "expected a text"]),
        ("diffusers", '"unnet"', ["diffusers is wrong", "got 'unnet'", "expected one of unet, "]),
        ("colour", "1", ["no such key", "got colour", "expected title, diffusers, kohya"]),
        ("experts", '"unet"', ["experts is wrong", "expected a list of unet"]),
        ("modules", "[]", ["modules is wrong", "got []", "expected [[modules]]"]),
        ("modules", "[{}]", ["lacks modules[0].pairs", "expected a list of lists of names"]),
        ("modules", "[{pairs = [[1, 2]]}]", ["modules[0].pairs is wrong", "got [[1, 2]]"]),
        ("modules", '[{pairs = [["a", "b"]], row = 1}]', ["no such key", "got modules[0].row"]),
        ("modules", '[{pairs = [["a", "b"]], rows = [0]}]', ["modules[0].rows is wrong"]),
        ("modules", '[{pairs = [["a", "b"]], rows = [1, 2]}]', ["a stands for 1 module in 2"]),
        ("modules", '[{pairs = [["a.{}", "b"]]}]', ["a.{} has other numbers"]),
        ("aliases", '[{alias = "z.", pairs = [["c", "d"]]}]', ["z.c stands for d, which is no"]),
        ("text_encoders", "{te = 3}", ["text_encoders.te is wrong", "got 3", "a table"]),
        (
            "text_encoders",
            '{te = {kohya = "x", comfyui = "y", paths = "clap"}}',
            ["text_encoders.te.paths is wrong", "got 'clap'", "expected one of clip, "],
        ),
    ],
)
def test_a_wrong_value_of_a_users_table_is_named(tmp_path, key, value, words):
    path = tmp_path / "map.toml"
    path.write_text("\n".join(f"{k} = {v}" for k, v in SOUND.items()))
    assert find_table(str(path)).title == "Mine"
    path.write_text("\n".join(f"{k} = {v}" for k, v in {**SOUND, key: value}.items()))
    with pytest.raises(OptionError) as refused:
        find_table(str(path))
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    assert all(word in text for word in words), text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("key", SOUND)
def test_a_table_without_a_key_is_refused_by_its_name(tmp_path, key):
    path = tmp_path / "map.toml"
    path.write_text("\n".join(f"{k} = {v}" for k, v in SOUND.items() if k != key))
    with pytest.raises(OptionError, match=f"map.toml: the table of names lacks {key}; expected "):
        find_table(str(path))
