"""Tinker's names beside experts, against the model: what PEFT merges of them, and the way back.

ΔW of every module is computed from the raw file as `tinker_cookbook/weights` 9dfcc3a2 applies it.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats.disk.errors import UnsupportedError

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "User", "Runtime")
]

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 40, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"moe_intermediate_size": 12, "num_experts_per_tok": 2}
QWEN = MOE | {
    "num_experts": 4, "shared_expert_intermediate_size": 12, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
    "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MODELS = {
    "Qwen3_5Moe": QWEN,
    "NemotronH": MOE | {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "mamba_num_heads": 4,
        "mamba_head_dim": 6, "ssm_state_size": 8, "n_groups": 1, "intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 12, "layers_block_type": ["mamba", "moe"]},
    "GptOss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12,
        "layer_types": ["full_attention"] * 2},
    "Qwen3Moe": MOE | {"num_experts": 4, "intermediate_size": 24},
}  # fmt: skip
WIDTH, INNER, EXPERTS, RANK = 16, 12, 4, 2


def model_of(kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Qwen3_5Moe')}Config")
    return getattr(transformers, f"{kind}ForCausalLM")(config(**SIZES, **MODELS[kind])).double()


PARTS = {
    "Qwen3_5Moe": {
        "model.layers.0.linear_attn.in_proj_q": (16, 8, ("in_proj_qkv", 0)),
        "model.layers.0.linear_attn.in_proj_k": (16, 8, ("in_proj_qkv", 8)),
        "model.layers.0.linear_attn.in_proj_v": (16, 24, ("in_proj_qkv", 16)),
        "model.layers.1.self_attn.o_proj": (16, 16, ("o_proj", 0)),
    },
    "NemotronH": {
        "model.layers.0.mixer.gate_proj": (16, 24, ("in_proj", 0)),
        "model.layers.0.mixer.x_proj": (16, 24, ("in_proj", 24)),
    },
    "GptOss": {
        "model.layers.0.attn.q_proj": (16, 16, ("self_attn.q_proj", 0)),
        "model.layers.1.attn.o_proj": (16, 16, ("self_attn.o_proj", 0)),
    },
    "Qwen3Moe": {"model.layers.1.self_attn.v_proj": (16, 16, ("v_proj", 0))},
}
"""By kind and module of the raw file: inputs, outputs, and where they begin in which module."""
LAYER = {"NemotronH": "model.layers.1.mixer"}


def raw(kind, folder):
    """Write a raw file; return ΔW in float64 by the model's parameter, and its factors."""
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    tensors, deltas = {}, {}
    names = {name: p.shape for name, p in model_of(kind).named_parameters()}
    for path, (in_, out, (leaf, start)) in PARTS[kind].items():
        a, b = draw(RANK, in_), draw(out, RANK)
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        owner = path.rpartition(".")[0].removesuffix(".attn")
        target = f"{owner}.{leaf}.weight"
        whole = deltas.setdefault(target, np.zeros(names[target]))
        whole[start : start + out] += 2.0 * b.astype(np.float64) @ a
    a, b = draw(RANK, WIDTH), draw(40, RANK)
    tensors |= {"model.unembed_tokens.lora_A.weight": a, "model.unembed_tokens.lora_B.weight": b}
    deltas["lm_head.weight"] = 2.0 * b.astype(np.float64) @ a
    owner = LAYER.get(kind, "model.layers.1.mlp") + ".experts"
    gated = kind != "NemotronH"
    shared, outer = draw(1, RANK, WIDTH), draw(1, WIDTH, RANK)
    single = {}
    for leaf in ("w1", "w3")[: 1 + gated]:
        b = draw(EXPERTS, INNER, RANK)
        tensors |= {f"{owner}.{leaf}.lora_A.weight": shared, f"{owner}.{leaf}.lora_B.weight": b}
        single[leaf] = 2.0 * b.astype(np.float64) @ shared
    a = draw(EXPERTS, RANK, INNER)
    tensors |= {f"{owner}.w2.lora_A.weight": a, f"{owner}.w2.lora_B.weight": outer}
    if not gated:
        empty = np.zeros(0, np.float32)
        tensors |= {f"{owner}.w3.lora_A.weight": empty, f"{owner}.w3.lora_B.weight": empty}
    down = 2.0 * outer.astype(np.float64) @ a
    up = np.concatenate([single["w1"], single["w3"]], 1) if gated else single["w1"]
    if kind == "GptOss":
        up = np.stack([single["w1"], single["w3"]], 2).reshape(EXPERTS, 2 * INNER, WIDTH)
        up, down = up.transpose(0, 2, 1), down.transpose(0, 2, 1)
    deltas[f"{owner}.{'gate_up_proj' if gated else 'up_proj'}"] = up
    deltas[f"{owner}.down_proj"] = down
    folder.mkdir()
    stored = {f"base_model.model.{name}": values for name, values in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": "all-linear",
              "base_model_name_or_path": "made/up"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas, stored


def off(weights, old, deltas):
    """Return the largest difference from the wanted change, relative to its largest value."""
    found = 0.0
    for name, before in old.items():
        wanted = deltas.get(name, np.zeros(before.shape))
        found = max(found, float(np.abs(weights[name] - before - wanted).max()))
    return found / max(float(np.abs(delta).max()) for delta in deltas.values())


@pytest.mark.parametrize("kind", MODELS)
def test_raw_file_is_what_its_model_gets_and_comes_back(kind, tmp_path):
    from peft import PeftModel

    deltas, stored = raw(kind, tmp_path / "raw")
    model = model_of(kind)
    model.save_pretrained(tmp_path / "base")
    old = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    base = tmp_path / "base"
    lt.fuse(base, tmp_path / "raw", output=tmp_path / "fused")
    fused = type(model).from_pretrained(tmp_path / "fused", dtype=torch.float64)
    new = {name: p.detach().numpy() for name, p in fused.named_parameters()}
    assert off(new, old, deltas) <= 2.0**-48
    lt.convert(tmp_path / "raw", to="peft", base=base, output=tmp_path / "peft")
    merged = PeftModel.from_pretrained(model, str(tmp_path / "peft")).merge_and_unload()
    new = {name: p.detach().numpy() for name, p in merged.named_parameters()}
    assert off(new, old, deltas) <= 2.0**-20
    lt.convert(tmp_path / "peft", to="tinker", base=base, output=tmp_path / "again")
    back = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert back.keys() == stored.keys()
    assert all(np.array_equal(back[key], stored[key]) for key in stored)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, "all-linear")


@pytest.mark.parametrize("kind", ["Qwen3_5Moe", "NemotronH"])
def test_parts_need_the_base(kind, tmp_path):
    raw(kind, tmp_path / "raw")
    with pytest.raises(UnsupportedError, match="adapts this projection in parts") as refused:
        lt.convert(tmp_path / "raw", to="peft", output=tmp_path / "peft")
    assert "--base BASE" in refused.value.hint
    assert not (tmp_path / "peft").exists()


def test_outputs_without_a_part_are_refused(tmp_path):
    kind = "NemotronH"
    model_of(kind).save_pretrained(tmp_path / "base")
    width = model_of(kind).model.layers[0].mixer.in_proj.out_features
    path = "base_model.model.model.layers.0.mixer.in_proj"
    tensors = {f"{path}.lora_A.weight": np.ones((2, WIDTH), np.float32),
               f"{path}.lora_B.weight": np.ones((width, 2), np.float32)}  # fmt: skip
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["in_proj"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="no place for the last outputs"):
        lt.convert(tmp_path / "a", to="tinker", base=tmp_path / "base", output=tmp_path / "b")


def test_mambas_own_x_proj_and_an_embedding_beside_it_stay(tmp_path):
    """A file of Mamba was taken for Tinker's parts of Nemotron, and lost its embedding in PEFT."""
    import peft
    import torch
    import transformers

    def model():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 4}
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))

    def merged(folder):
        whole = peft.PeftModel.from_pretrained(model(), folder).merge_and_unload()
        return {key: value.detach().numpy() for key, value in whole.named_parameters()}

    config = peft.LoraConfig(r=2, target_modules=["x_proj", "embeddings"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model(), config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "lora")
    assert not [f for f in lt.check(tmp_path / "lora").findings if f.code in ("LT115", "LT401")]
    lt.squeeze(tmp_path / "lora", energy=1.0, output=tmp_path / "squeezed")
    wanted, found = merged(tmp_path / "lora"), merged(tmp_path / "squeezed")
    before = dict(model().named_parameters())
    assert not np.allclose(
        wanted["backbone.embeddings.weight"], before["backbone.embeddings.weight"].detach()
    )
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-5, err_msg=key)
