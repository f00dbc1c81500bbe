"""Adapters of fused projections merged with adapters of their parts, against dense sums."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats.disk.errors import AdapterError

HEADS, KV_HEADS, HEAD, INNER = 4, 2, 8, 24
WIDTH, KV = HEADS * HEAD, KV_HEADS * HEAD
FUSED = {"self_attn.qkv_proj": WIDTH + 2 * KV, "mlp.gate_up_proj": 2 * INNER}
SPLIT = {
    "self_attn.q_proj": WIDTH,
    "self_attn.k_proj": KV,
    "self_attn.v_proj": KV,
    "mlp.gate_proj": INNER,
    "mlp.up_proj": INNER,
}
PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
LAYER = "model.layers.0."


def matrix(*shape, seed):
    return np.random.default_rng([*shape, seed]).standard_normal(shape).astype(np.float32)


def base(folder, rows, kind, architecture):
    folder.mkdir()
    sizes = {**rows, "self_attn.o_proj": WIDTH}
    tensors = {f"{LAYER}{m}.weight": matrix(n, WIDTH, seed=9) for m, n in sizes.items()}
    tensors[f"{LAYER}mlp.down_proj.weight"] = matrix(WIDTH, INNER, seed=9)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = matrix(16, WIDTH, seed=9)
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": kind, "architectures": [architecture], "hidden_size": WIDTH,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": INNER, "num_hidden_layers": 1, "vocab_size": 16,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter(folder, rows, seed):
    folder.mkdir()
    tensors = {}
    for module, n in rows.items():
        key = f"base_model.model.{LAYER}{module}.lora_"
        tensors[key + "A.weight"] = matrix(4, WIDTH, seed=seed)
        tensors[key + "B.weight"] = matrix(n, 4, seed=seed)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted(module.rpartition(".")[2] for module in rows)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def delta(folder):
    """Return ΔW of the two fused projections, in float64, by the configuration's numbers."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config.get("alpha_pattern")
    assert not config.get("use_rslora")
    ranks = config.get("rank_pattern") or {}
    assert set(ranks.values()) <= {config["r"]}
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            b = tensors[key.replace("lora_A", "lora_B")].astype(np.float64)
            module = key.split(LAYER)[1].removesuffix(".lora_A.weight")
            found[module] = config["lora_alpha"] / config["r"] * b @ a.astype(np.float64)
    return {
        fused: found.pop(fused) if fused in found else np.vstack([found[part] for part in parts])
        for fused, parts in PARTS.items()
    }


@pytest.fixture
def pair(tmp_path):
    return adapter(tmp_path / "a", FUSED, 1), adapter(tmp_path / "b", SPLIT, 2)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("rows", "kind", "architecture"),
    [(FUSED, "phi3", "Phi3ForCausalLM"), (SPLIT, "llama", "LlamaForCausalLM")],
)
def test_they_meet_exactly_in_the_names_of_the_base(
    pair, rows, kind, architecture, turned, tmp_path
):
    model = base(tmp_path / "base", rows, kind, architecture)
    lt.merge(pair[::-1] if turned else pair, base=model, output=tmp_path / "out")
    one, other = map(delta, pair)
    for module, got in delta(tmp_path / "out").items():
        true = one[module] + other[module]
        assert np.linalg.norm(got - true) <= 1e-6 * np.linalg.norm(true)
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    names = {key.split(LAYER)[1].partition(".lora_")[0] for key in keys}
    assert names == set(rows)


def test_without_a_base_they_are_refused(pair, tmp_path):
    with pytest.raises(AdapterError, match="name one module differently"):
        lt.merge(pair, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
