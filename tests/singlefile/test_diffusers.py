"""diffusers as the judge: files it saves, and what it makes of the files that we write.

Small pipelines with random weights. The change of a weight is what `fuse_lora` adds to it.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from dialect_files import KOHYA, PEFT, DialectFile, lycoris, save
from rounding import EPS, assert_equal_products
from test_dialects import dense, tensors_of

from loratools.cli import cli
from loratools_formats import find_format, read_adapter
from loratools_formats.disk.errors import UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore")

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (2, 2, 4),
}
UNET_XL = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "use_linear_projection": True,
}
TEXT = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 8,
    "projection_dim": 10,
}


def run(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def pipelines():
    """Return functions that make a small pipeline of each kind."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.set_num_threads(1)

    def unet():
        torch.manual_seed(0)
        return diffusers.StableDiffusionPipeline(
            vae=None,
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            tokenizer=None,
            unet=diffusers.UNet2DConditionModel(**UNET),
            scheduler=diffusers.DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def xl():
        torch.manual_seed(0)
        return diffusers.StableDiffusionXLPipeline(
            vae=None,
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)),
            tokenizer=None,
            tokenizer_2=None,
            unet=diffusers.UNet2DConditionModel(**UNET_XL),
            scheduler=diffusers.DDIMScheduler(),
            add_watermarker=False,
        )

    def flux():
        torch.manual_seed(0)
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT)),
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=diffusers.FluxTransformer2DModel(**FLUX),
        )

    return {"unet": unet, "xl": xl, "flux": flux}


COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def weights(pipeline):
    """Return every weight of the adaptable components, by component and path."""
    found = {}
    for component in COMPONENTS:
        model = getattr(pipeline, component, None)
        if model is None:
            continue
        for name, tensor in model.state_dict().items():
            path = name.replace(".base_layer", "")
            if path.endswith(".weight") and "lora" not in path:
                found[f"{component}.{path.removesuffix('.weight')}"] = tensor.double().clone()
    return found


def applied(make, path):
    """Return what a file adds to each weight of a fresh pipeline, where it adds anything."""
    pipeline = make()
    before = weights(pipeline)
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    parts = [name for name in COMPONENTS if getattr(pipeline, name, None) is not None]
    pipeline.fuse_lora(components=parts)
    pipeline.unload_lora_weights()
    after = weights(pipeline)
    assert before.keys() == after.keys()
    changes = {name: (after[name] - before[name]).numpy() for name in before}
    return {n: c.reshape(len(c), -1) for n, c in changes.items() if np.abs(c).max() > 0}


def ours(path):
    return {name: dense(delta) for name, delta in read_adapter(path).modules.items()}


def in_any_version(changes):
    """Name modules of text encoders without the outer module that transformers 5 dropped."""
    return {name.replace(".text_model.", "."): change for name, change in changes.items()}


def assert_same(found, expected):
    found, expected = in_any_version(found), in_any_version(expected)
    assert set(found) == set(expected)
    for name, change in expected.items():
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(found[name], change, rtol=0, atol=1e-6, err_msg=name)


def unet_file(alpha):
    """Return a kohya file for the small UNet and its text encoder, convolutions included."""
    file = DialectFile("kohya", {"kohya"}, seed=3)
    block = "lora_unet_down_blocks_0_attentions_0"
    inner = f"{block}_transformer_blocks_0"
    scale = {"alpha": alpha}
    for name, out, in_ in (
        (f"{inner}_attn1_to_q", 8, 8),
        (f"{inner}_attn2_to_k", 8, 12),
        (f"{inner}_attn1_to_out_0", 8, 8),
        (f"{inner}_ff_net_0_proj", 64, 8),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 12, 12),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", 16, 12),
    ):
        file.pair(name, out, in_, 4, KOHYA, **scale)
    file.pair(f"{block}_proj_in", 8, 8, 4, KOHYA, kernel=(1, 1), **scale)
    file.pair("lora_unet_down_blocks_0_resnets_0_conv1", 8, 8, 2, KOHYA, kernel=(3, 3), **scale)
    return _small(file)


def xl_file(alpha):
    """Return a kohya file for SDXL: the UNet in its original naming, and both text encoders."""
    file = DialectFile("kohya", {"kohya"}, seed=6)
    scale = {"alpha": alpha}
    for name, out, in_ in (
        ("unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 16, 24),
        ("unet_middle_block_1_transformer_blocks_0_ff_net_0_proj", 128, 16),
        ("unet_output_blocks_2_1_proj_in", 16, 16),
        *(
            (f"{encoder}_text_model_encoder_layers_0_{name}", out, in_)
            for encoder in ("te1", "te2")
            for name, out, in_ in (
                ("self_attn_q_proj", 12, 12),
                ("self_attn_k_proj", 12, 12),
                ("self_attn_v_proj", 12, 12),
                ("self_attn_out_proj", 12, 12),
                ("mlp_fc1", 16, 12),
                ("mlp_fc2", 12, 16),
            )
        ),
    ):
        file.pair(f"lora_{name}", out, in_, 4, KOHYA, **scale)
    file.pair("lora_te2_text_projection", 10, 12, 4, KOHYA, **scale)
    file.pair("lora_unet_input_blocks_4_0_in_layers_2", 16, 8, 2, KOHYA, kernel=(3, 3), **scale)
    return _small(file)


def flux_file(alpha):
    file = DialectFile("kohya", {"kohya"}, seed=4)
    h = 16
    double, single = "lora_unet_double_blocks_0", "lora_unet_single_blocks_0"
    for name, out, in_ in (
        (f"{double}_img_attn_qkv", 3 * h, h),
        (f"{double}_txt_attn_qkv", 3 * h, h),
        (f"{double}_txt_attn_proj", h, h),
        (f"{double}_img_mlp_0", 4 * h, h),
        (f"{double}_img_mod_lin", 6 * h, h),
        (f"{single}_linear1", 7 * h, h),
        (f"{single}_linear2", h, 5 * h),
        (f"{single}_modulation_lin", 3 * h, h),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 12, 12),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 16, 12),
    ):
        file.pair(name, out, in_, 4, KOHYA, alpha=alpha)
    return _small(file)


def _small(file):
    """Store float32, and keep changes small, so that fusing in float32 rounds little."""
    for name, tensor in file.tensors.items():
        if not name.endswith(".alpha"):
            file.tensors[name] = (tensor.astype(np.float32) * 0.1).astype(np.float32)
    return file


FILES = [("unet", unet_file), ("xl", xl_file), ("flux", flux_file)]


@pytest.mark.parametrize("options", [(), ("--keep-alpha",), ("--fold-alpha",)], ids=" ".join)
@pytest.mark.parametrize(("kind", "maker"), FILES)
def test_diffusers_applies_what_we_convert(pipelines, tmp_path, kind, maker, options):
    source = save(maker(3.0), tmp_path / "kohya.safetensors")
    target = tmp_path / "diffusers.safetensors"
    run("convert", source, target, "--to", "diffusers", *options)
    assert_same(applied(pipelines[kind], target), ours(target))
    keys = tensors_of(target)
    assert not any(key.endswith(".alpha") for key in keys)
    in_metadata = "lora_adapter_metadata" in read_adapter(target).metadata
    # Several ranks are stated in any case, since diffusers before 0.40 scales by the largest.
    ranks = {delta.rank for delta in read_adapter(target).modules.values()}
    assert in_metadata == (options != ("--fold-alpha",) or len(ranks) > 1)


@pytest.mark.parametrize("alpha", [2.0, 3.0], ids=["folded", "in metadata"])
@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_diffusers_applies_the_magnitudes_of_doras(pipelines, tmp_path, kind, alpha):
    """The change depends on the weights, and is that of the definition with the pipeline's."""
    file = DialectFile("kohya", {"kohya"}, seed=8)
    name, out, in_, kernel = {
        "unet": ("lora_unet_down_blocks_0_resnets_0_conv1", 8, 8, (3, 3)),
        "flux": ("lora_unet_double_blocks_0_img_attn_qkv", 48, 16, ()),
    }[kind]
    file.pair(name, out, in_, 4, KOHYA, alpha=alpha, kernel=kernel)
    file.tensors[f"{name}.dora_scale"] = np.linspace(0.5, 2.0, out).reshape(
        out, *(1 for _ in (in_, *kernel))
    ).astype(np.float32)  # fmt: skip
    source = save(_small(file), tmp_path / "kohya.safetensors")
    target = tmp_path / "diffusers.safetensors"
    options = ("--names", {"unet": "sd1", "flux": "flux1"}[kind])
    run("convert", source, target, "--to", "diffusers", *options)
    found = applied(pipelines[kind], target)
    before = weights(pipelines[kind]())
    adapter = read_adapter(target)
    assert set(found) == set(adapter.modules)
    for module, delta in adapter.modules.items():
        weight = before[module].numpy().reshape(len(found[module]), -1)
        whole = weight + dense(delta)
        magnitude = delta.magnitude.load(np.float64).reshape(-1, 1)
        expected = magnitude / np.linalg.norm(whole, axis=1, keepdims=True) * whole - weight
        np.testing.assert_allclose(found[module], expected, rtol=0, atol=1e-6, err_msg=module)


def test_doras_beside_plain_modules_are_a_loss(pipelines, tmp_path):
    """diffusers has DoRA in all modules of a component or in none; others may be plain."""
    file = DialectFile("kohya", {"kohya"}, seed=8)
    plain = "lora_unet_double_blocks_0_txt_attn_proj"
    text = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    dora = "lora_unet_double_blocks_0_img_attn_proj"
    file.pair(dora, 16, 16, 4, KOHYA, alpha=3.0)
    file.tensors[f"{dora}.dora_scale"] = np.ones((16, 1), np.float32)
    file.pair(text, 12, 12, 4, KOHYA, alpha=3.0)
    alone, target = save(file, tmp_path / "alone.safetensors"), tmp_path / "target.safetensors"
    run("convert", alone, target, "--to", "diffusers", "--names", "flux1")
    assert len(applied(pipelines["flux"], target)) == 2
    file.pair(plain, 16, 16, 4, KOHYA, alpha=3.0)
    mixed = save(file, tmp_path / "mixed.safetensors")
    command = ["convert", mixed, target, "--to", "diffusers", "--names", "flux1", "--overwrite"]
    with pytest.raises(UnsupportedError, match=r"to_out\.0 is a DoRA beside plain modules"):
        run(*command)
    run(*command, "--allow-lossy")
    assert_same(applied(pipelines["flux"], target), ours(target))


def test_diffusers_applies_squeezed_ranks_that_differ(pipelines, tmp_path):
    source = save(unet_file(2.0), tmp_path / "kohya.safetensors")
    target, smaller = tmp_path / "diffusers.safetensors", tmp_path / "smaller.safetensors"
    run("convert", source, target, "--to", "diffusers")
    run("squeeze", target, "-o", smaller, "--energy", "0.8")
    ranks = {delta.rank for delta in read_adapter(smaller).modules.values()}
    assert len(ranks) > 1
    assert_same(applied(pipelines["unet"], smaller), ours(smaller))


def test_diffusers_applies_our_kohya_files(pipelines, tmp_path):
    """Only the UNet is compared: of a text encoder, diffusers 0.42 drops some modules itself."""
    source = save(unet_file(2.0), tmp_path / "kohya.safetensors")
    smaller, named = tmp_path / "smaller.safetensors", tmp_path / "named.safetensors"
    run("squeeze", source, "-o", smaller, "--rank", "2")
    run("convert", smaller, named, "--to", "diffusers")
    found, expected = applied(pipelines["unet"], smaller), ours(named)
    assert_same(
        {name: change for name, change in found.items() if name.startswith("unet.")},
        {name: change for name, change in expected.items() if name.startswith("unet.")},
    )


@pytest.fixture
def saved(pipelines, tmp_path):
    """Return a function that saves a LoRA of a pipeline by diffusers, metadata or not."""
    import torch
    from diffusers.loaders.lora_base import _pack_dict_with_prefix  # noqa: F401
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    def filled(model, config):
        model.add_adapter(config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return get_peft_model_state_dict(model), config.to_dict()

    def save_unet(*, metadata):
        pipeline = pipelines["unet"]()
        unet_config = LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=["to_q", "to_k", "conv1", "proj_in"],
            rank_pattern={"to_k": 2},
            alpha_pattern={"conv1": 1},
            init_lora_weights=False,
        )
        unet, unet_meta = filled(pipeline.unet, unet_config)
        text_config = LoraConfig(
            r=3, lora_alpha=6, target_modules=["q_proj", "fc1"], init_lora_weights=False
        )
        text, text_meta = filled(pipeline.text_encoder, text_config)
        given = {
            "unet_lora_adapter_metadata": unet_meta,
            "text_encoder_lora_adapter_metadata": text_meta,
        }
        type(pipeline).save_lora_weights(
            tmp_path,
            unet_lora_layers=unet,
            text_encoder_lora_layers=convert_state_dict_to_diffusers(text)
            if not metadata
            else text,
            weight_name="saved.safetensors",
            **(given if metadata else {}),
        )
        return tmp_path / "saved.safetensors"

    def save_flux(*, metadata):
        pipeline = pipelines["flux"]()
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=["to_q", "proj_out", "proj_mlp"], use_rslora=True
        )
        state, meta = filled(pipeline.transformer, config)
        type(pipeline).save_lora_weights(
            tmp_path,
            transformer_lora_layers=state,
            weight_name="saved.safetensors",
            **({"transformer_lora_adapter_metadata": meta} if metadata else {}),
        )
        return tmp_path / "saved.safetensors"

    return {"unet": save_unet, "flux": save_flux}


@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "bare"])
@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_we_read_what_diffusers_saves_as_it_does(pipelines, saved, kind, metadata):
    path = saved[kind](metadata=metadata)
    assert find_format(path).name == "diffusers"
    assert_same(applied(pipelines[kind], path), ours(path))


def test_we_read_what_diffusers_turns_into_kohyas_form(saved, tmp_path):
    """Its alphas are whole numbers, and always the rank."""
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import load_file, save_file

    state = load_file(saved["unet"](metadata=True))
    path, back = tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    save_file({k: t.contiguous() for k, t in convert_state_dict_to_kohya(state).items()}, path)
    adapter = read_adapter(path)
    assert adapter.format == "kohya"
    assert {delta.direction.alpha_tensor.dtype.code for delta in adapter.modules.values()} == {
        "I64"
    }
    run("convert", path, back, "--to", "diffusers", "--names", "sd1")
    found = in_any_version(ours(back))
    names = {key.partition(".lora_")[0] for key in state}
    assert len(found) == len(names)
    for name in names:
        a, b = (state[f"{name}.lora_{side}.weight"].double().numpy() for side in "AB")
        expected = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        np.testing.assert_allclose(found[name.replace(".text_model.", ".")], expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_operations_keep_metadata_true(pipelines, saved, tmp_path, kind):
    path = saved[kind](metadata=True)
    smaller = tmp_path / "smaller.safetensors"
    run("squeeze", path, "-o", smaller, "--rank", "2", "--keep-alpha")
    assert_same(applied(pipelines[kind], smaller), ours(smaller))
    before = json.loads(read_adapter(path).metadata["lora_adapter_metadata"])
    after = json.loads(read_adapter(smaller).metadata["lora_adapter_metadata"])
    assert {key for key in before if after[key] != before[key]} <= {
        f"{component}.{name}"
        for component in ("unet", "transformer", "text_encoder")
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    }


@pytest.mark.parametrize(("kind", "maker"), FILES)
def test_kohya_to_diffusers_and_back_is_the_same(tmp_path, kind, maker):
    source = save(maker(3.0), tmp_path / "kohya.safetensors")
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    run("convert", source, there, "--to", "diffusers", "--keep-alpha")
    run("convert", there, back, "--to", "kohya", "--keep-alpha")
    expected, found = ours(source), ours(back)
    assert set(found) == set(expected)
    for name, change in expected.items():
        assert_equal_products(found[name], change, 4)
    assert tensors_of(back) == tensors_of(source)


def lycoris_file():
    """Return LoHa, LoKr, Tucker and a full difference on the small UNet, without biases."""
    file = lycoris()
    beside = {".diff_b", ".w_norm", ".b_norm"}
    for key in [key for key in file.tensors if key[key.rindex(".") :] in beside]:
        del file.tensors[key]
    block = "lora_unet_down_blocks_0"
    inner = f"{block}_attentions_0_transformer_blocks_0"
    rng = np.random.default_rng(9)
    shapes = {
        f"{inner}_attn1_to_q.hada_w{n}_{side}": shape
        for n in "12"
        for side, shape in (("a", (8, 2)), ("b", (2, 8)))
    } | {
        f"{inner}_attn1_to_k.lokr_w1": (2, 2),
        f"{inner}_attn1_to_k.lokr_w2_a": (4, 2),
        f"{inner}_attn1_to_k.lokr_w2_b": (2, 4),
        f"{inner}_attn1_to_v.lokr_w1": (2, 2),
        f"{inner}_attn1_to_v.lokr_w2": (4, 4),
        f"{block}_resnets_0_conv1.lora_down.weight": (2, 8, 1, 1),
        f"{block}_resnets_0_conv1.lora_up.weight": (8, 2, 1, 1),
        f"{block}_resnets_0_conv1.lora_mid.weight": (2, 2, 3, 3),
        f"{block}_resnets_0_conv2.diff": (8, 8, 3, 3),
    }
    assert set(shapes) == {key for key in file.tensors if not key.endswith(".alpha")}
    for key, shape in shapes.items():
        file.tensors[key] = (0.3 * rng.standard_normal(shape)).astype(np.float32)
    return file


def test_other_kinds_become_plain_and_then_diffusers(pipelines, tmp_path):
    source = save(lycoris_file(), tmp_path / "lycoris.safetensors")
    plain, target = tmp_path / "plain.safetensors", tmp_path / "diffusers.safetensors"
    done = CliRunner().invoke(cli, ["convert", str(source), str(target), "--to", "diffusers"])
    assert "which few of diffusers' pipelines load" in str(done.exception)
    assert f"loratools to-lora {source} -o plain.safetensors" in str(done.exception)
    assert not target.exists()
    told = json.loads(run("to-lora", source, "-o", plain, "--rank", "4", "--json", "-q"))
    run("convert", plain, target, "--to", "diffusers")
    found = applied(pipelines["unet"], target)
    assert_same(found, ours(target))
    errors = {module["name"]: module["relative_error"] for module in told["modules"]}
    for name, expected in ours(source).items():
        (path,) = [p for p in found if p.replace(".", "_") == name.replace("lora_", "", 1)]
        error = np.linalg.norm(found[path] - expected) / np.linalg.norm(expected)
        assert error == pytest.approx(errors[name], rel=1e-3, abs=1e-5)
    assert max(errors.values()) > 0.1


def test_split_modules_come_back_with_their_ranks_and_bytes(tmp_path):
    file = DialectFile("diffusers", {"diffusers"}, seed=5)
    block = "transformer.single_transformer_blocks.0"
    for name, out, rank in (("attn.to_q", 8, 2), ("attn.to_v", 8, 3), ("proj_mlp", 32, 5)):
        file.pair(f"{block}.{name}", out, 8, rank, PEFT)
    source = save(file, tmp_path / "diffusers.safetensors")
    for naming in ("kohya", "comfyui"):
        there, back = tmp_path / f"{naming}.safetensors", tmp_path / f"{naming}.back.safetensors"
        run("convert", source, there, "--to", naming, "--names", "flux1")
        (fused,) = ours(there).values()
        expected = np.zeros((7 * 8, 8))
        expected[:8] = file.deltas[f"{block}.attn.to_q"]
        expected[16:24] = file.deltas[f"{block}.attn.to_v"]
        expected[24:] = file.deltas[f"{block}.proj_mlp"]
        assert_equal_products(fused, expected, 5)
        run("convert", there, back, "--to", "diffusers")
        kept = {k: v for k, v in tensors_of(back).items() if ".to_k." not in k}
        assert kept == tensors_of(source)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("option", [(), ("--keep-alpha",)], ids=["folded", "kept"])
def test_pieces_of_mixed_factors_get_their_ranks_back(tmp_path, dtype, option):
    """Dense factors of a fused module, such as an SVD makes, of pieces of ranks 2, 3 and 1."""
    rng = np.random.default_rng(7)
    ranks = {"to_q": 2, "to_k": 3, "to_v": 1}
    pieces = {
        n: rng.standard_normal((16, r)) @ rng.standard_normal((r, 16)) for n, r in ranks.items()
    }
    u, s, vt = np.linalg.svd(np.concatenate(list(pieces.values())), full_matrices=False)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    file = DialectFile("kohya", {"kohya"})
    file.tensors = {
        f"{name}.lora_up.weight": (u[:, :6] * np.sqrt(s[:6])).astype(dtype),
        f"{name}.lora_down.weight": (np.sqrt(s[:6])[:, None] * vt[:6]).astype(dtype),
        f"{name}.alpha": np.array(18.0, np.float32),
    }
    source = save(file, tmp_path / "kohya.safetensors")
    target = tmp_path / "diffusers.safetensors"
    told = run("convert", source, target, "--to", "diffusers", "--names", "flux1", "--json", "-q",
               *option)  # fmt: skip
    error = json.loads(told)["relative_error"]
    # Two QRs of 48 rows, each off by at most rows · ε · ‖b‖‖a‖, and ‖b‖‖a‖ = Σσ ≤ √6 ‖ΔW‖.
    assert 0.0 < error < (1e-6 if dtype == np.float32 else 2 * 48 * EPS * 6**0.5)
    for name, delta in read_adapter(target).modules.items():
        own = name.rpartition(".")[2]
        assert delta.rank == ranks[own]
        assert delta.direction.scale == (3.0 if option else 1.0)
        np.testing.assert_allclose(
            dense(delta), 3.0 * pieces[own], atol=1e-4 if dtype == np.float32 else 1e-11
        )


def test_a_file_with_two_scale_carriers_is_refused(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    path = saved["flux"](metadata=True)
    metadata = dict(read_adapter(path).metadata)
    tensors = load_file(path)
    name = next(iter(tensors)).partition(".lora_")[0]
    tensors[f"{name}.alpha"] = np.array(2.0, np.float32)
    save_file(tensors, tmp_path / "both.safetensors", metadata)
    done = CliRunner().invoke(cli, ["info", str(tmp_path / "both.safetensors")])
    assert done.exit_code != 0
    assert "states scales twice" in str(done.exception)


def test_modules_of_several_ranks_state_them(tmp_path):
    """diffusers up to 0.39 takes one rank for all where a file states none."""
    file = DialectFile("diffusers", {"diffusers"}, seed=5)
    for name, rank in (("attn1.to_q", 4), ("attn1.to_k", 6)):
        file.pair(f"transformer.blocks.0.{name}", 8, 8, rank, PEFT)
    source = save(file, tmp_path / "in.safetensors")
    out = tmp_path / "out.safetensors"
    run("squeeze", source, "-o", out, "--energy", "0.9999999", "--max-rank", "5")
    adapter = read_adapter(out)
    assert len({delta.rank for delta in adapter.modules.values()}) == 2
    stated = json.loads(adapter.metadata["lora_adapter_metadata"])
    ranks = {delta.rank for delta in adapter.modules.values()}
    assert stated["transformer.r"] == max(ranks)
    assert set(stated["transformer.rank_pattern"].values()) == {min(ranks)}
    assert all(delta.require_factors().scale == 1.0 for delta in adapter.modules.values())
