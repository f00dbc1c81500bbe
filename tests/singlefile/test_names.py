"""Tables of names against diffusers: its modules on the one side, its converters on the other."""

from __future__ import annotations

import pytest
from dialect_files import PEFT, DialectFile, save
from test_dialects import tensors_of
from test_resolution import run

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
}


@pytest.fixture(scope="module")
def model_modules():
    """Return a function that lists the linear and convolutional modules of a model."""
    import diffusers
    import torch

    made = {}

    def modules(name):
        if name not in made:
            kind, config = MODELS[name]
            with torch.device("meta"):
                model = getattr(diffusers, kind)(**config)
            kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
            made[name] = {
                path: tuple(module.weight.shape)
                for path, module in model.named_modules()
                if isinstance(module, kinds)
            }
        return made[name]

    return modules


def original_of(table, path):
    place = table.locate(path, flat=False, schemes=("diffusers",))
    assert place is not None, path
    return place, filled(place.row.original, place.numbers)


def test_every_table_is_tested():
    assert {table.name for table in bundled_tables()} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_every_module_of_the_model_has_a_name_and_a_way_back(name, model_modules):
    table = find_table(name)
    reached = {}
    for path in model_modules(name):
        place, original = original_of(table, path)
        (part,) = place.covered
        assert (original, part) not in reached
        reached[original, part] = path
        for flat in (False, True):
            spelled = flattened(original) if flat else original
            back = table.locate(spelled, flat=flat, schemes=("original",))
            assert filled(back.row.diffusers[part], back.numbers) == path
            spelled = flattened(path) if flat else path
            again = table.locate(spelled, flat=flat, schemes=("diffusers",))
            assert again == place


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


# Both namings of Qwen-Image are one.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "qwen_image"])
def test_original_names_are_those_that_diffusers_converts(name, model_modules):
    """Give diffusers a checkpoint of our original names; its converter must make all modules."""
    import torch
    from diffusers.loaders import single_file_utils as converters

    table, modules = find_table(name), model_modules(name)
    heights, columns = {}, {}
    for path, shape in modules.items():
        place, original = original_of(table, path)
        heights.setdefault(original, {})[place.covered[0]] = shape[0]
        columns[original] = shape[1:]
    mark = {original: number for number, original in enumerate(sorted(heights))}
    checkpoint = {}
    for original, parts in heights.items():
        # Small in all but the first dimension; each row says where it is.
        rows = sum(parts.values())
        checkpoint[f"{original}.weight"] = (
            torch.arange(rows).double().reshape(-1, 1) + 1e6 * mark[original]
        )
    converted = _converted(converters, name, checkpoint, modules)
    for path, shape in modules.items():
        place, original = original_of(table, path)
        (part,) = place.covered
        start = sum(height for p, height in heights[original].items() if p < part)
        expected = torch.arange(start, start + shape[0])
        if place.row.swapped_halves:
            expected = torch.cat([expected[shape[0] // 2 :], expected[: shape[0] // 2]])
        found = converted[f"{path}.weight"].reshape(shape[0], -1)[:, 0] - 1e6 * mark[original]
        assert torch.equal(found.long(), expected), path


def _converted(converters, name, checkpoint, modules):
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
        hidden = modules["x_embedder"][0]
        full = {key.removeprefix(prefix): tensor for key, tensor in full.items()}
        for key in list(full):
            full[key.removesuffix(".weight") + ".bias"] = torch.zeros(full[key].shape[0])
        for key in list(full):
            for stream in ("img", "txt"):
                if key.endswith(f"{stream}_attn.qkv.weight"):
                    block = key.rpartition(".qkv")[0]
                    full[f"{block}.norm.query_norm.scale"] = torch.zeros(1)
                    full[f"{block}.norm.key_norm.scale"] = torch.zeros(1)
            if key.endswith("linear1.weight"):
                block = key.rpartition(".linear1")[0]
                full[f"{block}.norm.query_norm.scale"] = torch.zeros(1)
                full[f"{block}.norm.key_norm.scale"] = torch.zeros(1)
        assert hidden == 3072
        return converters.convert_flux_transformer_checkpoint_to_diffusers(full)
    convert = {
        "wan2": converters.convert_wan_transformer_to_diffusers,
        "z_image": converters.convert_z_image_transformer_checkpoint_to_diffusers,
    }[name]
    return convert(full)


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
        ("kohya", '"weird"', ["kohya is wrong", "got 'weird'", "expected original or diffusers"]),
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
