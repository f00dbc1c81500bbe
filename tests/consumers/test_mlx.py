"""mlx-lm as the judge: adapters of its layers read by us, and ours loaded by it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from whole_delta import effective_delta

from loratools.cli import cli
from loratools_formats import find_format, read_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

KEYS = ["self_attn.q_proj", "mlp.down_proj", "experts.up_proj"]


@pytest.fixture
def make_model():
    """Return a function that makes a small model with linear layers, experts and an embedding."""
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.models.switch_layers import SwitchLinear

    class Layer(nn.Module):
        def __init__(self, with_experts):
            super().__init__()
            self.self_attn = nn.Module()
            self.self_attn.q_proj = nn.Linear(10, 12, bias=False)
            self.mlp = nn.Module()
            self.mlp.down_proj = nn.Linear(14, 10, bias=False)
            if with_experts:
                self.experts = nn.Module()
                self.experts.up_proj = SwitchLinear(10, 6, 3, bias=False)

    class Model(nn.Module):
        def __init__(self, with_experts):
            super().__init__()
            self.embed_tokens = nn.Embedding(20, 10)
            self.layers = [Layer(with_experts) for _ in range(2)]

    def make(*, with_experts=True):
        mx.random.seed(0)
        return Model(with_experts)

    return make


def weights(model):
    from mlx.utils import tree_flatten

    return {
        name.removesuffix(".weight"): np.array(value)
        for name, value in tree_flatten(model.parameters())
        if name.endswith(".weight")
    }


def fused(model):
    """Return the weights after every adapted layer is fused, as mlx-lm does it."""
    from mlx.utils import tree_unflatten

    done = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(done))
    return weights(model)


def saved(model, folder, *, use_dora, keys):
    """Give a model random adapters, save them as mlx-lm's trainer does, and fuse them."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    parameters = {"rank": 3, "scale": 5.5, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, 1, parameters, use_dora=use_dora)
    mx.random.seed(1)
    noise = tree_map(
        lambda value: mx.random.normal(value.shape) * 0.3, model.trainable_parameters()
    )
    model.update(tree_map(lambda a, b: a + b, model.trainable_parameters(), noise))
    folder.mkdir()
    tensors = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    config = {
        "fine_tune_type": "dora" if use_dora else "lora",
        "num_layers": 1,
        "lora_parameters": parameters,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return fused(model)


def change(name, delta, weight):
    """Return our change of a weight, of a DoRA from its definition."""
    added = effective_delta(name, delta, weight.shape)
    if not delta.is_dora:
        return added
    whole = weight + added
    magnitude = delta.magnitude.load(np.float64)[:, None]
    return magnitude / np.linalg.norm(whole, axis=1, keepdims=True) * whole - weight


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_our_change_is_what_mlx_fuses(make_model, tmp_path, use_dora):
    keys = KEYS[:2] if use_dora else [*KEYS, "embed_tokens"]
    before = weights(make_model())
    after = saved(make_model(), tmp_path / "mlx", use_dora=use_dora, keys=keys)
    assert find_format(tmp_path / "mlx").name == "mlx"
    adapter = read_adapter(tmp_path / "mlx")
    assert set(adapter.modules) == {n for n in before if (before[n] != after[n]).any()}
    for name, delta in adapter.modules.items():
        weight = before[name].astype(np.float64)
        np.testing.assert_allclose(change(name, delta, weight), after[name] - weight, atol=1e-5)


def run(*arguments):
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("operation", ["squeeze", "peft and back"])
def test_mlx_loads_what_we_write(make_model, tmp_path, operation):
    from mlx_lm.tuner.utils import load_adapters

    saved(make_model(), tmp_path / "mlx", use_dora=False, keys=KEYS[:2])
    if operation == "squeeze":
        run("squeeze", tmp_path / "mlx", "-o", tmp_path / "out", "--rank", "2")
    else:
        run("convert", tmp_path / "mlx", tmp_path / "peft", "--to", "peft")
        run("convert", tmp_path / "peft", tmp_path / "out", "--to", "mlx")
    adapter = read_adapter(tmp_path / "out", "mlx")
    model = make_model()
    before = weights(model)
    model.freeze()
    after = fused(load_adapters(model, str(tmp_path / "out")))
    for name, weight in before.items():
        delta = adapter.modules.get(name)
        expected = 0.0 if delta is None else effective_delta(name, delta, weight.shape)
        np.testing.assert_allclose(after[name] - weight, expected, atol=1e-6, err_msg=name)


def test_doras_of_several_ranks_and_scales_get_one_for_mlx(make_model, tmp_path):
    from mlx_lm.tuner.utils import load_adapters
    from safetensors.numpy import save_file

    random, tensors, wanted = np.random.default_rng(4), {}, {}
    before = weights(make_model(with_experts=False))
    for name, rank in (("layers.1.self_attn.q_proj", 2), ("layers.1.mlp.down_proj", 3)):
        out, in_ = before[name].shape
        a, b = random.normal(size=(rank, in_)), random.normal(size=(out, rank))
        magnitude = 1 + random.random(out)
        parts = {"lora_A.weight": a, "lora_B.weight": b, "lora_magnitude_vector": magnitude}
        tensors |= {f"base_model.model.{name}.{leaf}": part for leaf, part in parts.items()}
        whole = before[name] + 5 / rank * b @ a
        wanted[name] = magnitude[:, None] / np.linalg.norm(whole, axis=1, keepdims=True) * whole
    (tmp_path / "peft").mkdir()
    single = {key: value.astype(np.float32) for key, value in tensors.items()}
    save_file(single, tmp_path / "peft/adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": 2, "rank_pattern": {"down_proj": 3}, "lora_alpha": 5,
        "use_dora": True, "target_modules": ["q_proj", "down_proj"],
    }  # fmt: skip
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config))
    run("convert", tmp_path / "peft", tmp_path / "out", "--to", "mlx")
    model = make_model(with_experts=False)
    model.freeze()
    after = fused(load_adapters(model, str(tmp_path / "out")))
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], wanted.get(name, weight), atol=1e-5, err_msg=name)


def test_ranks_that_differ_are_refused_before_anything_is_written(make_model, tmp_path):
    saved(make_model(), tmp_path / "mlx", use_dora=False, keys=KEYS[:2])
    done = CliRunner().invoke(
        cli,
        [
            "squeeze",
            str(tmp_path / "mlx"),
            "-o",
            str(tmp_path / "out"),
            "--rank-pattern",
            "q_proj=1",
        ],
    )
    assert "the file needs one rank for these modules" in str(done.exception)
    assert not (tmp_path / "out").exists()


BODIES = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_fc"]),
    "gpt_neox": (
        "GPTNeoX",
        {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4},
        ["query_key_value", "dense_4h_to_h"],
    ),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
             ["q_proj", "fc_in"]),
}  # fmt: skip
OWN = {"n_ctx": 64, "rotary_emb_base": 1e4, "rotary_pct": 0.25, "rope_theta": 1e4}
"""What mlx-lm's configurations have beside those of transformers 5."""


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_that_are_called_otherwise_are_found_by_mlx_and_come_back(kind, tmp_path):
    import importlib

    import peft
    import torch
    import transformers
    from mlx_lm.tuner.utils import load_adapters

    name, sizes, targets = BODIES[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, vocab_size=96)
    cls = getattr(transformers, f"{name}LMHeadModel" if kind == "gpt2" else f"{name}ForCausalLM")
    whole = cls(config)
    whole.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    adapted = peft.get_peft_model(whole, lora)
    for key, weight in adapted.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "lora")
    run("convert", tmp_path / "lora", tmp_path / "mlx", "--to", "mlx", "--base", tmp_path / "base")
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    values = OWN | json.loads((tmp_path / "base" / "config.json").read_text())
    model = module.Model(module.ModelArgs.from_dict(values))
    model.freeze()
    before = weights(model)
    after = fused(load_adapters(model, str(tmp_path / "mlx")))
    source = read_adapter(tmp_path / "lora")
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert len(moved) == len(source.modules)
    run("convert", tmp_path / "mlx", tmp_path / "back", "--to", "peft", "--base", tmp_path / "base")
    back = read_adapter(tmp_path / "back")
    assert back.modules.keys() == source.modules.keys()
    for path, change in source.modules.items():
        shape = change.shape
        np.testing.assert_allclose(
            effective_delta(path, back.modules[path], shape),
            effective_delta(path, change, shape), rtol=0, atol=1e-6,
        )  # fmt: skip
    done = CliRunner().invoke(
        cli, ["convert", str(tmp_path / "lora"), str(tmp_path / "x"), "--to", "mlx"]
    )
    assert "name the body differently" in str(done.exception)


def test_layers_that_mlx_divides_otherwise_are_refused(tmp_path):
    import peft
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
             "num_attention_heads": 4, "vocab_size": 96}  # fmt: skip
    model = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).save_pretrained(tmp_path / "lora")
    words = [tmp_path / "lora", tmp_path / "x", "--to", "mlx", "--base", tmp_path / "base"]
    done = CliRunner().invoke(cli, ["convert", *map(str, words)])
    assert "mlx-lm has no such layer" in str(done.exception)


def test_embeddings_of_gpt_neox_come_to_peft_as_embeddings(tmp_path):
    """Its embedding is called `embed_in`, as no other's, and its output layer `embed_out`."""
    from mlx_lm.models import gpt_neox
    from peft import PeftModel
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 40}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "m")
    model = gpt_neox.Model(gpt_neox.ModelArgs("gpt_neox", 32, 16, 2, 1, 1e-5, 40, 10000, 0.25))
    before, keys = weights(model), ["model.embed_in", "model.embed_out"]
    after = saved(model, tmp_path / "mlx", use_dora=False, keys=keys)
    run("convert", tmp_path / "mlx", tmp_path / "peft", "--to", "peft", "--base", tmp_path / "m")

    def both(model):
        layers = (model.get_input_embeddings(), model.get_output_embeddings())
        return [layer.weight.detach().double().numpy().copy() for layer in layers]

    base = GPTNeoXForCausalLM.from_pretrained(tmp_path / "m")
    old = both(base)
    new = both(PeftModel.from_pretrained(base, tmp_path / "peft").merge_and_unload())
    for key, was, now in zip(keys, old, new, strict=True):
        want = after[key].astype(np.float64) - before[key]
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(now - was, want, atol=1e-5)
