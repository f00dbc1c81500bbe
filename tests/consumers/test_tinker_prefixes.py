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
from loratools_formats.disk.errors import AdapterError, UnsupportedError

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


def changes(cls, base, fused):
    """Return what fusing changed of the embedding and of the output layer, and if they are one."""
    old, new = (cls.from_pretrained(folder).double() for folder in (base, fused))
    assert old.lm_head.weight is old.model.embed_tokens.weight
    before = old.lm_head.weight.detach().numpy()
    ends = (new.model.embed_tokens.weight, new.lm_head.weight)
    return (*(end.detach().numpy() - before for end in ends), ends[0] is ends[1])


def test_a_tied_output_layer_changes_with_the_embedding(tmp_path):
    """Tinker's own merge adds it to the weight that both share; PEFT's change is of one of them."""
    from peft import PeftModel

    base = tmp_path / "base"
    cls, model = model_of("Qwen3_5MoeForCausalLM", base, tied=True)
    delta = raw(tmp_path / "raw", model, "model", "model.unembed_tokens")["lm_head.weight"]
    done = lt.convert(tmp_path / "raw", to="peft", base=base, output=tmp_path / "peft")
    assert "head-alone" not in {finding.code for finding in done.findings}
    lt.convert(tmp_path / "peft", to="tinker", base=base, output=tmp_path / "again")
    stored, again = (
        load_file(tmp_path / x / "adapter_model.safetensors") for x in ("raw", "again")
    )
    assert stored.keys() == again.keys()
    assert all(np.array_equal(stored[key], again[key]) for key in stored)
    for source in ("raw", "peft", "again"):
        result = lt.fuse(base, tmp_path / source, output=tmp_path / f"{source}-fused")
        codes = {finding.code for finding in result.findings}
        assert {"stays-tied"} <= codes
        assert ("head-of-both" in codes) == (source != "peft")
        embedding, _, are_one = changes(cls, base, tmp_path / f"{source}-fused")
        assert are_one
        assert np.abs(embedding - delta).max() <= 2.0**-44
        assert lt.verify(
            tmp_path / f"{source}-fused", base=base, adapters=tmp_path / "raw"
        ).contained
    assert "LT408" not in {f.code for f in lt.check(tmp_path / "raw", base=base).findings}
    tokens = torch.arange(1, 9)[None]
    adapted = PeftModel.from_pretrained(model.float(), str(tmp_path / "peft"))  # its experts' type
    fused = cls.from_pretrained(tmp_path / "raw-fused").float()
    with torch.no_grad():
        found, wanted = adapted(tokens).logits, fused(tokens).logits
    assert (found - wanted).abs().max() <= 2.0**-16 * wanted.abs().max()


def test_an_output_layer_alone_is_told_from_one_that_is_tied(tmp_path):
    base = tmp_path / "base"
    cls, model = model_of("Qwen3_5MoeForCausalLM", base, tied=True)
    delta = raw(tmp_path / "raw", model, "model", "model.unembed_tokens")["lm_head.weight"]
    done = [
        lt.convert(tmp_path / "raw", to="peft", output=tmp_path / "alone"),
        lt.squeeze(tmp_path / "raw", rank=RANK, output=tmp_path / "squeezed"),
        lt.convert(tmp_path / "alone", to="tinker", output=tmp_path / "tinker"),
    ]
    for result in done:
        assert "head-alone" in {finding.code for finding in result.findings}
    result = lt.fuse(base, tmp_path / "alone", output=tmp_path / "fused")
    assert "untied" in {finding.code for finding in result.findings}
    embedding, head, are_one = changes(cls, base, tmp_path / "fused")
    assert not embedding.any()
    assert not are_one
    assert np.abs(head - delta).max() <= 2.0**-44
    with pytest.raises(UnsupportedError, match="changes one of them alone"):
        lt.convert(tmp_path / "alone", to="tinker", base=base, output=tmp_path / "no")
    with pytest.raises(AdapterError, match="another adapter's is of the output layer alone"):
        lt.merge([tmp_path / "raw", tmp_path / "alone"], output=tmp_path / "no")
    lt.merge([tmp_path / "raw", tmp_path / "alone"], base=base, output=tmp_path / "both")
    lt.fuse(base, tmp_path / "both", output=tmp_path / "both-fused")
    embedding, head, _ = changes(cls, base, tmp_path / "both-fused")
    assert np.abs(embedding - delta).max() <= 2.0**-44
    assert np.abs(head - 2 * delta).max() <= 2.0**-43


def test_a_head_that_is_stored_beside_a_tied_embedding_is_refused_with_both_ways(tmp_path):
    base = tmp_path / "base"
    _, model = model_of("Qwen3_5MoeForCausalLM", base, tied=True)
    raw(tmp_path / "raw", model, "model", "model.unembed_tokens")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="yet it stores both") as told:
        lt.fuse(base, tmp_path / "raw", output=tmp_path / "no")
    assert "output layer alone, or remove the tensor, which changes both" in told.value.hint


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


def test_a_set_keeps_that_a_change_is_of_both_layers(tmp_path):
    _, model = model_of("Qwen3_5MoeForCausalLM", tmp_path / "base", tied=True)
    raw(tmp_path / "raw", model, "model", "model.unembed_tokens")
    lt.convert(tmp_path / "raw", to="peft", output=tmp_path / "alone")
    both = {"one": tmp_path / "raw", "two": tmp_path / "raw"}
    shared = tmp_path / "shared.safetensors"
    lt.fleet_share(both, rank=RANK, output=shared)
    taken = lt.fleet_unshare(shared, name="one", output=tmp_path / "one")
    (head,) = (c for n, c in taken.made["one"].modules.items() if n.endswith("lm_head"))
    assert head.layer.tied
    assert "head-alone" in {finding.code for finding in taken.findings}
    with pytest.raises(AdapterError, match=r"of the output layer alone.*--to peft --base BASE"):
        lt.fleet_share({"raw": tmp_path / "raw", "alone": tmp_path / "alone"}, rank=RANK)
    with pytest.raises(AdapterError, match="of the output layer alone"):
        lt.fleet_add(shared, tmp_path / "alone", name="more")
