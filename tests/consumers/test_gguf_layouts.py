"""The table of architectures agrees with llama.cpp, module by module, on full weights."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loratools.lowrank.matrices import loaded
from loratools_formats import Adapter, Context, Layer, LowRank, get_format
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.tensors import in_memory
from loratools_formats.formats.gguf.architectures import ALL, ARCHITECTURES

BY_CLASS = {
    name: row
    for row in ALL
    if row.given is None and row.name != "dbrx"  # which test_dbrx_gguf compares
    for name in row.classes
}

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_local_experts": 3,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "query_pre_attn_scalar": 8,
}
SPECIAL = {
    "GPT2LMHeadModel": {"n_inner": None, "n_ctx": 64},
    "BloomForCausalLM": {"n_head": 4},
    "FalconForCausalLM": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 2,
    },
    "MixtralForCausalLM": {"intermediate_size": 24},
    "GPTNeoXForCausalLM": {"num_key_value_heads": None},
    "PhiForCausalLM": {"num_key_value_heads": 4},
}
INTERNLM2 = {
    "model.layers.0.attention.wqkv": (64, 32),
    "model.layers.0.attention.wo": (32, 32),
    "model.layers.0.feed_forward.w1": (80, 32),
    "model.layers.0.feed_forward.w2": (32, 80),
    "model.layers.0.feed_forward.w3": (80, 32),
    "model.tok_embeddings": (96, 32),
    "output": (96, 32),
}
NAMED_EXPERTS = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
MIXTRAL_EXPERTS = {"w1": (24, 32), "w2": (32, 24), "w3": (24, 32)}


def config_of(name):
    """Return a small configuration of a class as transformers writes it."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    if name == "InternLM2ForCausalLM":
        return {**SIZES, "architectures": [name], "model_type": "internlm2"}
    kind = "gemma3_text" if name.startswith("Gemma3") else None
    kind = kind or next(k for k, found in NAMES.items() if found == name)
    values = {**SIZES, **SPECIAL.get(name, {})}
    if name == "FalconForCausalLM":
        del values["head_dim"]
    config = transformers.AutoConfig.for_model(kind, **values)
    config.architectures = [name]
    return json.loads(config.to_json_string(use_diff=False))


def shapes_of(name, config):
    """Return the shapes of all weights a class has that the table names, as stored."""
    import torch
    import transformers

    if name == "InternLM2ForCausalLM":
        return {f"{path}.weight": shape for path, shape in INTERNLM2.items()}
    kind = transformers.AutoConfig.for_model(config["model_type"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(type(kind).from_dict(config))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.named_parameters()}
    if "Mixtral" in name or "Moe" in name:
        shapes = {k: s for k, s in shapes.items() if not k.startswith("model.layers.1.mlp.")}
    if name == "MixtralForCausalLM":  # as transformers before version 5 named them
        for expert in range(3):
            owner = f"model.layers.1.block_sparse_moe.experts.{expert}"
            shapes |= {f"{owner}.{leaf}.weight": s for leaf, s in MIXTRAL_EXPERTS.items()}
        shapes = {k: s for k, s in shapes.items() if ".mlp." not in k}  # not in checkpoints
        shapes["model.layers.1.block_sparse_moe.gate.weight"] = (3, 32)
    if name in ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"):
        for expert in range(3):
            owner = f"model.layers.1.mlp.experts.{expert}"
            shapes |= {f"{owner}.{leaf}.weight": s for leaf, s in NAMED_EXPERTS.items()}
    return shapes


def delta_for(architecture, key, shape, rng):
    """Return (module path, delta, ΔW as stored) for a weight, None if the table lacks it."""
    path = key.removesuffix(".weight")
    always_tied = not architecture.outputs and path == architecture.embedding
    if architecture.module(path) is None or always_tied:
        return None
    rank = 3
    *stack, rows, columns = shape
    layer, turned = Layer("linear"), False
    if path == architecture.embedding:
        layer, turned = Layer("embedding"), True
    elif stack:
        layer = Layer("experts", parameters=(path,))
        path = path.rpartition(".")[0] + ".base_layer" * path.endswith("gate_up_proj")
    elif architecture.conv1d and path not in architecture.outputs:
        turned = True
    out, in_ = (columns, rows) if turned else (rows, columns)
    a, b = rng.standard_normal((*stack, rank, in_)), rng.standard_normal((*stack, out, rank))
    stored = (b @ a).swapaxes(-1, -2) if turned else b @ a
    delta = LowRank(in_memory(f"{key}.a", a), in_memory(f"{key}.b", b), 1.0, layer)
    return path, ModuleChange(delta), stored


def dense(delta):
    products = np.stack([b @ a for b, a in loaded(delta.require_factors())])
    whole = products if delta.layer.kind == "experts" else products[0]
    return whole.T if delta.layer.kind == "embedding" else whole


@pytest.fixture(scope="module")
def translations(tmp_path_factory):
    """Return for each class: our tensors and those of llama.cpp's converter."""
    root = tmp_path_factory.mktemp("layouts")
    ours, arguments = {}, []
    for number, (name, architecture) in enumerate(BY_CLASS.items()):
        rng = np.random.default_rng(number)
        folder = root / name
        folder.mkdir()
        config = config_of(name)
        (folder / "config.json").write_text(json.dumps(config))
        vocabulary = {"model": {"vocab": {str(i): i for i in range(96)}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        prefix = architecture.classes[name]
        modules, weights = {}, {}
        for key, shape in shapes_of(name, config).items():
            made = delta_for(architecture, key, shape, rng)
            if made is not None:
                path, delta, weights[key] = made
                called = prefix + path.removeprefix("model.") if path[:6] == "model." else path
                modules[called] = delta
        np.savez(folder / "weights.npz", **weights)
        adapter = Adapter(format="peft", source=None, modules=modules)
        context = Context(base=folder)
        ours[name] = get_format("gguf").from_model(adapter, context)
        arguments += [folder, root / f"{name}.npz"]
    script = Path(__file__).parent / "llama_cpp_layouts.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (adapter, dict(np.load(root / f"{name}.npz"))) for name, adapter in ours.items()}


@pytest.mark.parametrize("name", BY_CLASS)
def test_every_module_becomes_what_the_converter_makes_of_it(translations, name):
    adapter, wanted = translations[name]
    assert adapter.config["architecture"] == wanted.pop("architecture")
    found = {f"{key}.weight": dense(delta) for key, delta in adapter.modules.items()}
    assert set(found) == set(wanted)
    for key, values in found.items():
        np.testing.assert_allclose(values, wanted[key], atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", BY_CLASS)
def test_every_module_of_the_table_was_compared(translations, name):
    adapter, _ = translations[name]
    architecture = ARCHITECTURES[adapter.config["architecture"]]
    named = [t for module in architecture.modules.values() for t in module.tensors]
    tensors = {t.removeprefix("blk.#.") for t in named if t.startswith("blk.")}
    if name in ("LlamaForCausalLM", "MistralForCausalLM"):
        tensors = {t for t in tensors if not t.endswith("_exps") and t != "ffn_gate_inp"}
    if name == "MixtralForCausalLM":
        tensors -= {"ffn_gate", "ffn_up", "ffn_down"}
    blocks = {key.rpartition(".")[2] for key in adapter.modules if key.startswith("blk.")}
    assert blocks == tensors
    assert ({"token_embd", "output"} <= set(adapter.modules)) == bool(architecture.outputs)


@pytest.mark.parametrize("name", BY_CLASS)
def test_the_way_back_gives_the_same_deltas(translations, name, tmp_path):
    adapter, _ = translations[name]
    (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
    target, context = get_format("gguf"), Context(base=tmp_path)
    back = replace(target.to_model(adapter, context), format="peft")
    again = target.from_model(back, context)
    assert set(again.modules) == set(adapter.modules)
    for key, delta in adapter.modules.items():
        np.testing.assert_allclose(dense(again.modules[key]), dense(delta), atol=1e-12)
