"""One answer to whether an embedding is tied: in every command, for every spelling."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loratools.algebra.ranks import RankRule
from loratools.operations.convert.operation import prepare
from loratools.operations.extract.operation import difference, extract
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.to_lora import to_lora
from loratools.operations.verify import verify
from loratools_formats import Context, read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError, UnsupportedError

VOCABULARY, WIDTH = 30, 8
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def config(kind, top=None, inside="flat", model_class=None):
    found = {
        "model_type": kind,
        "architectures": [model_class or f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_attention_heads": 2,
        "intermediate_size": 16,
    }  # fmt: skip
    if top is not None:
        found["tie_word_embeddings"] = top
    if inside != "flat":
        found["text_config"] = {"model_type": f"{kind}_text", "vocab_size": VOCABULARY}
        if inside is not None:
            found["text_config"]["tie_word_embeddings"] = inside
    return found


GEMMA3 = "Gemma3ForConditionalGeneration"
# Configuration, whether the output layer is stored, and whether transformers ties the two.
CASES = {
    "true": (config("llama", top=True), False, True),
    "left out, head stored": (config("llama"), True, False),
    "false": (config("llama", top=False), True, False),
    "left out, tied by default": (config("gemma"), False, True),
    "false against the default": (config("gemma", top=False), True, False),
    "outside only": (config("gemma3", True, None, GEMMA3), False, True),
    "inside only": (config("gemma3", None, True, GEMMA3), False, True),
    "neither, tied by default": (config("gemma3", None, None, GEMMA3), False, True),
    "false inside, head stored": (config("gemma3", None, False, GEMMA3), True, False),
    "false inside, true outside": (config("gemma3", True, False, GEMMA3), False, True),
    "false in both": (config("gemma3", False, False, GEMMA3), True, False),
    "inside only, llava": (
        config("llava", None, True, "LlavaForConditionalGeneration"), False, True,
    ),
    "false outside, true inside": (
        config("llava", False, True, "LlavaForConditionalGeneration"), False, True,
    ),
    "no class, no head": ({"model_type": "gemma3"}, False, True),
}  # fmt: skip
LLAMAS = [name for name, (values, *_) in CASES.items() if values["model_type"] == "llama"]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Return a base of each spelling, its tensors, and whether it is tied."""
    values, has_head, tied = CASES[request.param]
    tensors = {EMBED: numbers(VOCABULARY, WIDTH), Q: numbers(WIDTH, WIDTH, seed=1)}
    if has_head:
        tensors[HEAD] = numbers(VOCABULARY, WIDTH, seed=2)
    return written(tmp_path / "base", tensors, values), tensors, tied


def written(folder, tensors, values):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def saved(folder, tensors, **values):
    folder.mkdir()
    prefixed = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(common | values))
    return read_adapter(folder)


def tokens(folder):
    values = {"model.embed_tokens.trainable_tokens_delta": numbers(2, WIDTH, seed=3)}
    return saved(
        folder, values, peft_type="TRAINABLE_TOKENS", token_indices=[3, 5],
        target_modules=["embed_tokens"],
    )  # fmt: skip


def lora(folder, module):
    """Return a LoRA of rank 2 and scale 1 on the embedding or the output layer, and its ΔW."""
    if module == "lm_head":
        a, b = numbers(2, WIDTH, seed=4), numbers(VOCABULARY, 2, seed=5)
        tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        delta = b.astype(np.float64) @ a
    else:
        a, b = numbers(2, VOCABULARY, seed=4), numbers(WIDTH, 2, seed=5)
        tensors = {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
        delta = (b.astype(np.float64) @ a).T
    name = module.rpartition(".")[2]
    adapter = saved(folder, tensors, peft_type="LORA", r=2, lora_alpha=2, target_modules=[name])
    return adapter, delta


def test_to_lora_refuses_token_rows_where_the_head_would_follow(case, tmp_path):
    base, _, tied = case
    adapter = tokens(tmp_path / "tokens")
    if tied:
        with pytest.raises(UnsupportedError, match="cannot be expressed as a plain LoRA"):
            to_lora(adapter, RankRule(), base=read_checkpoint(base))
    else:
        made = to_lora(adapter, RankRule(), base=read_checkpoint(base)).adapter
        assert [d.rank for d in made.modules.values()] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
def test_fuse_unties_what_changes_alone_and_verify_agrees(case, tmp_path, module):
    base, tensors, tied = case
    values = json.loads((base / "config.json").read_text())
    adapter, delta = lora(tmp_path / "lora", module)
    inputs = [FuseInput(adapter, 1.0, "lora")]
    Fusion(read_checkpoint(base), inputs, FuseOptions()).write(tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    wanted = {EMBED: tensors[EMBED], HEAD: tensors.get(HEAD, tensors[EMBED])}
    changed = f"{module}.weight"
    wanted[changed] = (wanted[changed] + delta).astype(np.float32)
    for key, value in wanted.items():
        np.testing.assert_array_equal(fused[key], value)
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    if tied:
        assert config["tie_word_embeddings"] is False
        assert config.get("text_config", {}).get("tie_word_embeddings", False) is False
        assert ("text_config" in config) <= ("tie_word_embeddings" in config.get("text_config", {}))
    else:
        assert config == values
    found = verify(read_checkpoint(tmp_path / "fused"), read_checkpoint(base), inputs)
    assert {t.name: t.verdict for t in found.tensors} == dict.fromkeys(fused, "exact")


def test_token_rows_change_the_tied_head_too(case, tmp_path):
    base, tensors, tied = case
    inputs = [FuseInput(tokens(tmp_path / "tokens"), 1.0, "tokens")]
    Fusion(read_checkpoint(base), inputs, FuseOptions()).write(tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert (HEAD in fused) is not tied
    wanted = tensors[EMBED].copy()
    wanted[[3, 5]] = numbers(2, WIDTH, seed=3)
    np.testing.assert_array_equal(fused[EMBED], wanted)
    if not tied:
        np.testing.assert_array_equal(fused[HEAD], tensors[HEAD])
    assert json.loads((tmp_path / "fused/config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )


@pytest.mark.parametrize("copied", [False, True])
def test_extract_carries_tied_embeddings_whole(case, tmp_path, copied):
    base, tensors, tied = case
    values = json.loads((base / "config.json").read_text())
    new = {**tensors, EMBED: tensors[EMBED] + numbers(VOCABULARY, WIDTH, seed=6)}
    new[Q] = tensors[Q] + numbers(WIDTH, WIDTH, seed=7)
    if copied and tied:
        new[HEAD] = new[EMBED].copy()
    tuned = read_checkpoint(written(tmp_path / "tuned", new, values))
    found = difference(read_checkpoint(base), tuned)
    embedding = "model.embed_tokens"
    assert (embedding in found.adapter.modules) is not tied
    assert len(found.adapter.replacements) == tied
    result = extract(read_checkpoint(base), tuned, found, RankRule(rank=WIDTH))
    inputs = [FuseInput(result.adapter, 1.0, "extracted")]
    Fusion(read_checkpoint(base), inputs, FuseOptions()).write(tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert fused.keys() == tensors.keys()
    for key in fused:
        np.testing.assert_allclose(fused[key], new[key], atol=1e-5)


def test_extract_refuses_a_tied_base_that_parted(tmp_path):
    values = config("llama", top=True)
    old = {EMBED: numbers(VOCABULARY, WIDTH), Q: numbers(WIDTH, WIDTH, seed=1)}
    old[HEAD] = old[EMBED].copy()
    new = {**old, EMBED: old[EMBED] + 1.0, Q: old[Q] + 1.0}
    base = read_checkpoint(written(tmp_path / "base", old, values))
    parted = read_checkpoint(written(tmp_path / "parted", new, values))
    with pytest.raises(UnsupportedError, match="stores two different ones"):
        difference(base, parted)
    new[HEAD] = new[EMBED].copy()
    together = read_checkpoint(written(tmp_path / "together", new, values))
    found = difference(base, together)
    assert [r.target for r in found.adapter.replacements.values()] == [EMBED]
    assert list(found.adapter.modules) == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize("module", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("case", LLAMAS, indirect=True)
def test_gguf_adapters_of_tied_weights_are_refused(case, tmp_path, module):
    base, _, tied = case
    adapter, _ = lora(tmp_path / "lora", module)
    if tied:
        with pytest.raises(UnsupportedError, match="output layer"):
            prepare(adapter, "gguf", Context(base=base))
    else:
        made = prepare(adapter, "gguf", Context(base=base)).adapter
        assert set(made.modules) == {"output" if module == "lm_head" else "token_embd"}


def test_a_config_alone_that_does_not_tell_is_refused_for_gguf(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config("llama")))
    adapter, _ = lora(tmp_path / "lora", "lm_head")
    with pytest.raises(UnsupportedError, match="does not tell"):
        prepare(adapter, "gguf", Context(base=tmp_path))


@pytest.mark.parametrize("value", ["yes", 1])
def test_a_flag_that_is_no_flag_is_an_error(tmp_path, value):
    tensors = {EMBED: numbers(VOCABULARY, WIDTH)}
    base = written(tmp_path / "base", tensors, config("llama") | {"tie_word_embeddings": value})
    inputs = [FuseInput(lora(tmp_path / "lora", "lm_head")[0], 1.0, "lora")]
    with pytest.raises(AdapterError, match="tie_word_embeddings is wrong"):
        Fusion(read_checkpoint(base), inputs, FuseOptions())
