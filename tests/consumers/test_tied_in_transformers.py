"""Whether an embedding is tied, in every spelling of the configuration, as transformers has it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loratools as lt
from loratools.base.placement.names import Names
from loratools.base.tied import find_tie, shared_embeddings
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.checkpoints.tie_defaults import BY_TOP, TIED
from loratools_formats.core.tensors import equal_values

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 24, "head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def _gemma3(config):
    return config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)


def _llava(text):
    def made(config):
        parts = {
            "text_config": text(**TEXT),
            "vision_config": transformers.CLIPVisionConfig(**VISION),
        }
        return config(**parts, image_token_index=3)

    return made


def _qwen3_vl_moe(config):
    text = {**TEXT, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    vision = {
        "depth": 1, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2,
        "intermediate_size": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    return config(text_config=text, vision_config=vision)


T = transformers
MODELS = {
    "llama": (T.LlamaForCausalLM, lambda c: c(**TEXT)),
    "gemma": (T.GemmaForCausalLM, lambda c: c(**TEXT)),
    "qwen2": (T.Qwen2ForCausalLM, lambda c: c(**TEXT)),
    "gpt2": (
        T.GPT2LMHeadModel,
        lambda c: c(n_embd=16, n_layer=1, n_head=2, vocab_size=24, n_positions=32),
    ),
    "bert": (T.BertForMaskedLM, lambda c: c(**TEXT)),
    "t5": (
        T.T5ForConditionalGeneration,
        lambda c: c(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=24),
    ),
    "gemma3": (T.Gemma3ForConditionalGeneration, _gemma3),
    "qwen3_vl_moe": (T.Qwen3VLMoeForConditionalGeneration, _qwen3_vl_moe),
    "llava of llama": (T.LlavaForConditionalGeneration, _llava(T.LlamaConfig)),
    "llava of gemma": (T.LlavaForConditionalGeneration, _llava(T.GemmaConfig)),
}  # fmt: skip
FLAGS = (True, False, None)


def spellings(config):
    """Yield the configuration with the flag at the top, inside, both, neither."""
    for top in FLAGS:
        for inside in FLAGS if "text_config" in config else (None,):
            found = json.loads(json.dumps(config))
            for part, value in ((found, top), (found.get("text_config", {}), inside)):
                part.pop("tie_word_embeddings", None)
                if value is not None:
                    part["tie_word_embeddings"] = value
            yield found


def stored_twice(folder: Path, model, *, equal: bool) -> None:
    """Store the output layer beside the embedding, as a copy of it or another one."""
    tensors = load_file(folder / "model.safetensors")
    names = Names(read_checkpoint(folder))
    parameters = {id(p): n for n, p in model.named_parameters()}
    embedding = parameters[id(model.get_input_embeddings().weight)]
    key = names.find(embedding)
    head = next(
        n for n, m in model.named_modules() if m is model.get_output_embeddings()
    ) + ".weight"  # fmt: skip
    value = tensors[key].clone()
    old_prefix = "language_model." if key.startswith("language_model.model.") else ""
    tensors[old_prefix + head] = value if equal else value + 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["head left out", "copy of the embedding", "another head"])
@pytest.mark.parametrize("name", MODELS)
def test_tied_is_what_transformers_ties(name, layout, tmp_path):
    kind, config = MODELS[name]
    torch.manual_seed(0)
    made = config(kind.config_class)
    for part in (made, getattr(made, "text_config", made)):
        part.tie_word_embeddings = True
    model = kind(made)
    model.save_pretrained(tmp_path)
    if layout != "head left out":
        stored_twice(tmp_path, model, equal=layout == "copy of the embedding")
    compared = 0
    for spelled in spellings(json.loads((tmp_path / "config.json").read_text())):
        (tmp_path / "config.json").write_text(json.dumps(spelled))
        loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True)
        if info["missing_keys"]:
            continue  # an output layer that starts at random is no checkpoint of a model
        compared += 1
        wanted = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        names = Names(read_checkpoint(tmp_path))
        if name == "t5":  # three layers share it, and none of them can be changed alone
            assert "shared" in shared_embeddings(names)
            assert not wanted or layout != "head left out" or len(shared_embeddings(names)) == 3
            continue
        tie = find_tie(names)
        ends = [] if tie is None else [names.tensors.get(k) for k in (tie.embedding, tie.head)]
        found = tie is not None and (not tie.is_head_stored or equal_values(*ends))
        assert found is wanted, spelled
    assert compared > 0


def test_the_table_of_defaults_is_that_of_transformers():
    script = runpy.run_path(str(Path(__file__).parents[1] / "golden/make_tie_defaults.py"))
    assert set(script["tied"]()) == TIED
    assert set(script["by_top"]()) == BY_TOP


SMALL = {"num_hidden_layers": 1, "vocab_size": 40}
OF_OPENAI = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 16}
OF_BERT = {**SMALL, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
OF_XLNET = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 40}
BY_OTHER_NAMES = [
    ("embeddings", T.MambaForCausalLM, {**SMALL, "hidden_size": 16, "state_size": 4}),
    ("word_embedding", T.XLNetLMHeadModel, OF_XLNET),
    ("tokens_embed", T.OpenAIGPTLMHeadModel, OF_OPENAI),
    ("w", T.CTRLLMHeadModel, {**OF_OPENAI, "dff": 32}),
    ("word_embeddings", T.MegatronBertForMaskedLM, OF_BERT),
    ("word_embeddings", T.BertGenerationDecoder, {**OF_BERT, "is_decoder": True}),
]
"""The name of an embedding, a class that ties it, and a small configuration."""


@pytest.mark.parametrize(("name", "kind", "sizes"), BY_OTHER_NAMES)
def test_an_embedding_changes_alone_whatever_it_is_called(name, kind, sizes, tmp_path):
    torch.manual_seed(0)
    kind(kind.config_class(**sizes)).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=[name], init_lora_weights=False)
    model = peft.get_peft_model(kind.from_pretrained(tmp_path / "base"), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    lt.fuse(tmp_path / "base", tmp_path / "adapter", output=tmp_path / "fused")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        want = model(tokens)[0]
        got = kind.from_pretrained(tmp_path / "fused").eval()(tokens)[0]
        before = kind.from_pretrained(tmp_path / "base").eval()(tokens)[0]
    assert torch.linalg.norm(got - want) <= 1e-5 * torch.linalg.norm(want)
    assert torch.linalg.norm(before - want) >= 0.1 * torch.linalg.norm(want)
