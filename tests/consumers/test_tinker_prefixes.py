"""Tinker's names without the part of the model that a layer is in, and its output layer's names.

Tinker writes `model.layers` for models whose language model stands elsewhere, and GLM's head as
`model.lm_head`. ΔW is computed from the raw file; PEFT's merge and transformers say what arrives.
"""

import json
import re

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file

import loratools as lt

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "User", "Runtime")
]

CASES = {
    "Qwen3.5 alone": ("Qwen3_5MoeForCausalLM", "model", "model.unembed_tokens"),
    "Qwen3.5": ("Qwen3_5MoeForConditionalGeneration", "model", "model.unembed_tokens"),
    "Kimi": ("Kimi_K25ForConditionalGeneration", "model", "model.unembed_tokens"),
    "Kimi, whole": ("Kimi_K25ForConditionalGeneration", "language_model.model",
                    "language_model.lm_head"),
    "GLM": ("GlmMoeDsaForCausalLM", "model", "model.lm_head"),
    "GLM, vision": ("Glm4vMoeForConditionalGeneration", "model", "model.unembed_tokens"),
}  # fmt: skip
RANK = 2


def model_of(name, folder, *, tied=False):
    import transformers

    cls = getattr(transformers, name)
    config = tiny_models.config_of(cls)
    for part in (config, getattr(config, "text_config", config)):
        part.tie_word_embeddings = tied
    torch.manual_seed(0)
    cls(config).double().save_pretrained(folder)
    return cls, cls.from_pretrained(folder).double()


def raw(folder, model, prefix, head):
    """Write a raw file of experts, attention and head; return ΔW by the model's parameter."""
    rng = np.random.default_rng(3)
    weights = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors, deltas = {}, {}

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def pair(path, a, b):
        names = (f"base_model.model.{path}.lora_{x}.weight" for x in "AB")
        tensors.update(zip(names, (a, b), strict=True))
        return 2.0 * b.astype(np.float64) @ a.astype(np.float64)

    down = next(name for name in weights if name.endswith("experts.down_proj"))
    experts, width, inner = weights[down]
    owner = re.search(r"layers\.\d+\..*(?=\.down_proj)", down)[0]
    a = draw(1, RANK, width)
    gate_up = [
        pair(f"{prefix}.{owner}.{leaf}", a, draw(experts, inner, RANK)) for leaf in ("w1", "w3")
    ]
    deltas[down.replace("down_proj", "gate_up_proj")] = np.concatenate(gate_up, 1)
    deltas[down] = pair(f"{prefix}.{owner}.w2", draw(experts, RANK, inner), draw(1, width, RANK))
    for name, shape in weights.items():
        if name.endswith("self_attn.o_proj.weight"):
            path = re.search(r"layers\..*(?=\.weight)", name)[0]
            deltas[name] = pair(f"{prefix}.{path}", draw(RANK, shape[1]), draw(shape[0], RANK))
    deltas["lm_head.weight"] = pair(head, draw(RANK, width), draw(96, RANK))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": "all-linear",
              "base_model_name_or_path": "made/up"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def off(model, old, deltas):
    found = 0.0
    for name, weight in model.named_parameters():
        change = weight.detach().numpy() - old[name]
        found = max(found, float(np.abs(change - deltas.get(name, 0.0)).max()))
    return found


@pytest.mark.parametrize("case", CASES)
def test_layers_are_found_wherever_the_model_has_them(case, tmp_path):
    from peft import PeftModel

    name, prefix, head = CASES[case]
    base = tmp_path / "base"
    cls, model = model_of(name, base)
    old = {key: p.detach().numpy().copy() for key, p in model.named_parameters()}
    deltas = raw(tmp_path / "raw", model, prefix, head)
    found = {finding.code for finding in lt.check(tmp_path / "raw", base=base).findings}
    assert "LT406" not in found
    lt.squeeze(tmp_path / "raw", rank=RANK, output=tmp_path / "same")
    lt.convert(tmp_path / "raw", to="peft", base=base, output=tmp_path / "peft")
    lt.convert(tmp_path / "peft", to="tinker", base=base, output=tmp_path / "back")
    for source in ("raw", "same", "peft", "back"):
        lt.fuse(base, tmp_path / source, output=tmp_path / f"{source}-fused")
        fused = cls.from_pretrained(tmp_path / f"{source}-fused").double()
        assert off(fused, old, deltas) <= 2.0**-44, source
    merged = PeftModel.from_pretrained(model, str(tmp_path / "peft")).merge_and_unload()
    assert off(merged, old, deltas) <= 2.0**-44
    stored, again = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("raw", "back"))
    if prefix == "model" and head == "model.unembed_tokens":
        assert stored.keys() == again.keys()
    assert all(np.array_equal(stored[key], again[key]) for key in stored.keys() & again.keys())


@pytest.mark.parametrize("source", ["raw", "peft"])
def test_a_tied_output_layer_comes_to_stand_alone(source, tmp_path):
    """Only the output layer is adapted; the embedding stays, and the fused model says so."""
    base = tmp_path / "base"
    cls, model = model_of("Qwen3_5MoeForCausalLM", base, tied=True)
    embedding = model.model.embed_tokens.weight.detach().numpy().copy()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    delta = raw(tmp_path / "raw", model, "model", "model.unembed_tokens")["lm_head.weight"]
    lt.convert(tmp_path / "raw", to="peft", base=base, output=tmp_path / "peft")
    result = lt.fuse(base, tmp_path / source, output=tmp_path / "fused")
    assert "untied" in {finding.code for finding in result.findings}
    fused = cls.from_pretrained(tmp_path / "fused").double()
    np.testing.assert_array_equal(fused.model.embed_tokens.weight.detach().numpy(), embedding)
    head = fused.lm_head.weight.detach().numpy()
    assert np.abs(head - embedding - delta).max() <= 2.0**-44


def test_parts_that_peft_does_not_find_are_told_until_they_are_joined(tmp_path):
    base = tmp_path / "base"
    _, model = model_of("Qwen3_5MoeForCausalLM", base)
    raw(tmp_path / "raw", model, "model", "model.unembed_tokens")
    file = tmp_path / "raw" / "adapter_model.safetensors"
    tensors = load_file(file)
    fused = model.model.layers[0].linear_attn.in_proj_qkv
    config = model.config
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    path = "base_model.model.model.layers.0.linear_attn.in_proj_q"
    tensors[f"{path}.lora_A.weight"] = np.ones((RANK, fused.in_features), np.float32)
    tensors[f"{path}.lora_B.weight"] = np.ones((keys, RANK), np.float32)
    save_file(tensors, file)
    squeezed = lt.squeeze(tmp_path / "raw", rank=1, output=tmp_path / "small")
    for findings in (squeezed.findings, lt.read(tmp_path / "small").findings):
        (told,) = (each for each in findings if each.code == "projections-in-parts")
        assert "in_proj_q" in told.message
        assert "--to peft --base BASE" in told.hint
    lt.convert(tmp_path / "small", to="peft", base=base, output=tmp_path / "peft")
    joined = lt.read(tmp_path / "peft")
    assert "model.layers.0.linear_attn.in_proj_qkv" in joined.modules
    assert "projections-in-parts" not in {finding.code for finding in joined.findings}
