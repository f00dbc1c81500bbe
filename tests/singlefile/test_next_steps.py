"""Refusals whose hints are followed, prefixes that merge in any order, systems that are named."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli


def invoke(*words, folder=None):
    return CliRunner().invoke(cli, list(map(str, words)), catch_exceptions=True)


def run(*words):
    done = invoke(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def peft(name, out=8, in_=8, seed=0):
    return {
        f"{name}.lora_A.weight": draw(2, in_, seed=seed),
        f"{name}.lora_B.weight": draw(out, 2, seed=seed + 1),
    }


def kohya(name, out=8, in_=8, seed=0):
    return {
        f"{name}.lora_down.weight": draw(2, in_, seed=seed),
        f"{name}.lora_up.weight": draw(out, 2, seed=seed + 1),
        f"{name}.alpha": np.array(2.0, np.float32),
    }


def saved(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return path


_Q, _PROJECTION = (
    "diffusion_model.transformer_blocks.0.attn1.to_q", "text_embedding_projection.aggregate_embed",
)  # fmt: skip


@pytest.fixture
def ltx2(tmp_path):
    return {
        "style": saved(tmp_path / "style.safetensors", peft(_Q)),
        "distilled": saved(
            tmp_path / "distilled.safetensors", peft(_Q, seed=3) | peft(_PROJECTION, 8, 16, seed=5)
        ),
    }


@pytest.mark.parametrize("order", [("style", "distilled"), ("distilled", "style")])
def test_ltx2_merges_in_any_order(tmp_path, ltx2, order):
    lt.merge([ltx2[name] for name in order], output=tmp_path / "m.safetensors")
    merged = lt.read(tmp_path / "m.safetensors")
    assert sorted(merged.modules) == [_Q, _PROJECTION]
    both = [lt.read(path) for path in ltx2.values()]
    np.testing.assert_allclose(
        lt.delta(merged, _Q), sum(lt.delta(each, _Q) for each in both), atol=1e-6
    )


def test_ltx2_is_named_as_diffusers_names_it(tmp_path, ltx2):
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_ltx2_lora_to_diffusers as convert,
    )

    output = tmp_path / "d.safetensors"
    lt.convert(ltx2["distilled"], to="diffusers", output=output)
    state = load_file(ltx2["distilled"])
    wanted = convert(dict(state)) | convert(dict(state), "text_embedding_projection")
    found = {k: v for k, v in load_file(output).items() if not k.endswith(".alpha")}
    assert found.keys() == wanted.keys()
    for target in ("comfyui", "kohya"):
        lt.convert(output, to=target, output=tmp_path / f"{target}.safetensors")
    back = tmp_path / "back.safetensors"
    lt.convert(tmp_path / "kohya.safetensors", to="diffusers", output=back)
    assert lt.read(back).modules.keys() == lt.read(output).modules.keys()
    assert _PROJECTION in lt.read(tmp_path / "comfyui.safetensors").modules


def test_only_the_prefix_is_exchanged_on_request(tmp_path):
    source = saved(tmp_path / "a.safetensors", peft("diffusion_model.some_blocks.0.attn.q"))
    done = invoke("convert", source, "-o", tmp_path / "d.safetensors", "--to", "diffusers")
    assert "component" in done.exception.hint
    run("convert", source, "-o", tmp_path / "d.safetensors", "--to", "diffusers", "--component",
        "transformer")  # fmt: skip
    assert list(lt.read(tmp_path / "d.safetensors").modules) == ["transformer.some_blocks.0.attn.q"]
    run("convert", tmp_path / "d.safetensors", "-o", tmp_path / "c.safetensors", "--to", "comfyui",
        "--component", "diffusion_model")  # fmt: skip
    assert load_file(tmp_path / "c.safetensors").keys() == load_file(source).keys()
    run("convert", source, "-o", tmp_path / "p", "--to", "peft", "--component", "transformer")
    assert list(lt.read(tmp_path / "p").modules) == ["some_blocks.0.attn.q"]


@pytest.mark.parametrize("policy", ["first", "average", "b.safetensors"])
def test_embeddings_of_one_name_are_settled(tmp_path, policy):
    name, token = "lora_unet_mid_block_attentions_0_proj_in", "bundle_emb.tok.string_to_param.*"
    one, other = (
        saved(tmp_path / f"{n}.safetensors", kohya(name) | {token: draw(2, 8, seed=seed)})
        for n, seed in (("a", 1), ("b", 2))
    )
    done = invoke("merge", one, other, "-o", tmp_path / "m.safetensors")
    assert "`replacements`" in done.exception.hint
    run("merge", one, other, "-o", tmp_path / "m.safetensors", "--replacements", policy)
    values = [load_file(path)[token] for path in (one, other)]
    wanted = {"first": values[0], "average": (values[0] + values[1]) / 2}.get(policy, values[1])
    np.testing.assert_allclose(load_file(tmp_path / "m.safetensors")[token], wanted, atol=1e-7)


def test_onetrainers_t5_is_fluxs_second_encoder(tmp_path):
    tensors = kohya("lora_transformer_transformer_blocks_0_attn_to_q")
    tensors |= kohya("lora_te2_encoder_block_0_layer_0_SelfAttention_q", seed=4)
    source = saved(tmp_path / "ot.safetensors", tensors)
    run("convert", source, "-o", tmp_path / "c.safetensors", "--to", "comfyui")
    assert sorted(lt.read(tmp_path / "c.safetensors").modules) == [
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ]


_U = "lora_unet_blocks_0_self_attn_q"


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({f"{_U}.oft_R.weight": draw(2, 6)}, "OneTrainer's OFT"),
        (
            {"oft_unet_single_blocks_0_linear1.oft_blocks.0": draw(2, 4, 4),
             "oft_unet_single_blocks_0_linear1.alpha": np.array(1, np.float32)},
            "sd-scripts' OFT",
        ),
        (
            {f"{_U}.q_layer.weight": draw(4, 8), f"{_U}.p_layer.weight": draw(8, 4),
             f"{_U}.lambda_layer": draw(1, 4), f"{_U}.alpha": np.array(4, np.float32)},
            "T-LoRA",
        ),
        (
            {"transformer_blocks.0.qkv_proj.lora_down": draw(8, 4),
             "transformer_blocks.0.qkv_proj.lora_up": draw(24, 4)},
            "Nunchaku",
        ),
    ],
    ids=["onetrainer", "sd-scripts", "t-lora", "nunchaku"],
)  # fmt: skip
def test_systems_that_are_known_and_not_read_are_named(tmp_path, tensors, what):
    done = invoke("info", saved(tmp_path / "a.safetensors", tensors))
    assert what in done.exception.message
    assert done.exception.hint


def test_network_arguments_follow_what_the_file_holds(tmp_path):
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{_U}.{leaf}": draw(*shape) for leaf, shape in shapes.items()}
    metadata = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo": "loha", "use_tucker": "True", "dora_wd": "True"}',
        "ss_network_dim": "2",
    }
    source = saved(tmp_path / "loha.safetensors", tensors, metadata)
    run("merge", source, "-o", tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "np") as opened:
        found = opened.metadata()
    assert json.loads(found["ss_network_args"]) == {"algo": "lora"}
    assert found["ss_network_dim"] == "4"


def test_ranks_of_convolutions_are_stated_anew(tmp_path):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{name}.lora_down.weight": draw(4, 8, 3, 3), f"{name}.lora_up.weight": draw(8, 4, 1, 1),
        f"{name}.alpha": np.array(4.0, np.float32),
    }  # fmt: skip
    metadata = {"ss_network_args": '{"conv_dim": "4", "conv_alpha": "4.0", "dropout": "0.1"}'}
    source = saved(tmp_path / "conv.safetensors", tensors, metadata)
    run("squeeze", source, "--rank", "2", "-o", tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "np") as opened:
        args = json.loads(opened.metadata()["ss_network_args"])
    assert args == {"conv_dim": "2", "conv_alpha": "2", "dropout": "0.1"}


def follow(hint, **placeholders):
    """Run the command that a hint names, with what only the user knows filled in."""
    words = shlex.split("loratools " + hint.partition("loratools ")[2].partition(", or ")[0])
    return run(*(placeholders.get(word, word) for word in words[1:]))


def test_a_kind_that_cannot_be_split_is_made_plain_as_the_hint_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    source = {f"{name}.lokr_w1": draw(4, 2), f"{name}.lokr_w2": draw(6, 4)}
    save_file(source, "lokr.safetensors")
    save_file(
        {f"transformer_blocks.0.attn.to_{c}.weight": draw(8, 8) for c in "qkv"}, "base.safetensors"
    )
    for command in (
        ("convert", "A", "-o", "d.safetensors", "--to", "diffusers"),
        ("convert", "A", "-o", "d.safetensors", "--to", "diffusers", "--allow-lossy"),
    ):
        done = invoke(*("lokr.safetensors" if word == "A" else word for word in command))
        follow(done.exception.hint)
        run(*("plain.safetensors" if word == "A" else word for word in command), "--overwrite")
        for made in [*tmp_path.glob("plain.safetensors*"), *tmp_path.glob("d.safetensors*")]:
            made.unlink()
    run("fuse", "base.safetensors", "lokr.safetensors", "-o", "fused")
    wanted = np.concatenate([draw(8, 8)] * 3) + np.kron(*source.values())
    found = np.concatenate(
        [load_file("fused")[f"transformer_blocks.0.attn.to_{c}.weight"] for c in "qkv"]
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_module_of_nan_is_taken_out_as_the_hint_says(tmp_path):
    good, bad = "lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_0_self_attn_k"
    tensors = kohya(good) | kohya(bad)
    tensors[f"{bad}.lora_up.weight"][0] = np.nan
    source = saved(tmp_path / "a.safetensors", tensors)
    for command in (("squeeze", source, "--rank", "1"), ("merge", source), ("to-lora", source)):
        words = (*command, "-o", tmp_path / f"{command[0]}.safetensors")
        done = invoke(*words)
        if done.exit_code == 0:
            continue
        (pattern,) = shlex.split(done.exception.hint.partition("`drop`: ")[2])
        run(*words, "--drop", pattern)
        assert list(lt.read(words[-1]).modules) == [good]


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "peft"])
def test_one_unknown_module_is_the_only_one_named(tmp_path, to):
    tensors = kohya("lora_unet_my_module")
    for index in range(3):
        tensors |= kohya(f"lora_unet_double_blocks_{index}_img_attn_qkv", 24, 8)
        tensors |= kohya(f"lora_unet_single_blocks_{index}_linear2", 8, 40)
    source = saved(tmp_path / "a.safetensors", tensors)
    output = tmp_path / ("o" if to == "peft" else "o.safetensors")
    done = invoke("convert", source, "-o", output, "--to", to)
    assert done.exception.got == "lora_unet_my_module"
    assert "which has the others" in done.exception.message
    (pattern,) = shlex.split(done.exception.hint.partition("`drop`: ")[2])
    run("convert", source, "-o", output, "--to", to, "--drop", pattern, "--names", "flux1")


def test_names_of_several_architectures_are_settled_by_a_base_or_a_table(tmp_path):
    tensors = {}
    for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
        tensors |= peft(f"transformer.transformer_blocks.0.attn.{leaf}")
    source = saved(tmp_path / "a.safetensors", tensors)
    base = {
        "pos_embed.proj.weight": draw(8, 4, 2, 2), "context_embedder.weight": draw(8, 8),
        "transformer_blocks.0.norm1.linear.weight": draw(48, 8),
        "transformer_blocks.0.attn.add_q_proj.weight": draw(8, 8),
    }  # fmt: skip
    for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
        base[f"transformer_blocks.0.attn.{leaf}.weight"] = draw(8, 8)
    saved(tmp_path / "base.safetensors", base)
    output = tmp_path / "o.safetensors"
    done = invoke("convert", source, "-o", output, "--to", "comfyui")
    assert "`names`" in done.exception.hint
    assert "`base`" in done.exception.hint
    wanted = None
    for option in (["--names", "sd3"], ["--base", tmp_path / "base.safetensors"]):
        run("convert", source, "-o", output, "--to", "comfyui", "--overwrite", *option)
        names = list(lt.read(output).modules)
        assert names[0] == "diffusion_model.joint_blocks.0.x_block.attn.proj"
        assert wanted in (None, names)
        wanted = names


def test_merging_what_cannot_be_named_says_how_to_name_it(tmp_path):
    one = saved(tmp_path / "one.safetensors", kohya("lora_unet_joint_blocks_0_x_block_attn_proj"))
    tensors = {}
    for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
        tensors |= peft(f"transformer.transformer_blocks.0.attn.{leaf}")
    other = saved(tmp_path / "other.safetensors", tensors)
    done = invoke("merge", one, other, "-o", tmp_path / "m.safetensors")
    if done.exit_code == 0:
        return  # the first file's names tell
    words = shlex.split("loratools " + done.exception.hint.partition("loratools ")[2])
    named = tmp_path / "named.safetensors"
    run(*({"TABLE": "sd3", "renamed.safetensors": named}.get(word, word) for word in words[1:]))
    run("merge", one, named, "-o", tmp_path / "m.safetensors")
