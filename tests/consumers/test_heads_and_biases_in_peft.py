"""What PEFT makes of tied output layers, of biases of saved modules and of those of lora_B."""

from __future__ import annotations

import numpy as np
import peft_oracle
import pytest
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats.disk.errors import AdapterError, UnsupportedError

pytestmark = [pytest.mark.filterwarnings(line) for line in peft_oracle.WARNINGS]

TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
IDS = list(range(1, 20))


def model(kind):
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {**TEXT, "hidden_size": 32, "intermediate_size": 48}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config).double().eval()
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)
        return transformers.GPT2LMHeadModel(config).double().eval()
    if kind == "t5":
        config = transformers.T5Config(
            d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=96
        )
        return transformers.T5ForConditionalGeneration(config).double().eval()
    config = transformers.RobertaConfig(**sizes, num_labels=3, max_position_embeddings=66)
    return transformers.RobertaForSequenceClassification(config).double().eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits.numpy()


def trained(kind, folder, **config):
    """Save a base and a random adapter of it; return what PEFT computes with that."""
    import peft
    import torch

    model(kind).save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model(kind), peft.LoraConfig(r=4, lora_alpha=6, **config))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if weight.requires_grad and "magnitude" not in name:
                weight.add_(0.1 * torch.randn(weight.shape))
    adapted.save_pretrained(folder / "lora")


def with_peft(kind, folder):
    import peft

    return logits(peft.PeftModel.from_pretrained(model(kind), folder).double().eval())


def assert_close(found, wanted, kind):
    change = np.abs(wanted - logits(model(kind))).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * change)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_output_layer_that_is_tied_has_the_embedding_as_its_weight(kind, use_dora, tmp_path):
    targets = ["lm_head", "q_proj" if kind == "llama" else "c_attn"]
    trained(kind, tmp_path, target_modules=targets, use_dora=use_dora, task_type="CAUSAL_LM")
    base, source = tmp_path / "base", tmp_path / "lora"
    wanted = with_peft(kind, source)
    if not use_dora:
        lt.to_dora(source, base=base, output=tmp_path / "dora")
        source = tmp_path / "dora"
        assert_close(with_peft(kind, source), wanted, kind)
    lt.to_lora(source, base=base, rank=32, output=tmp_path / "plain")
    assert_close(with_peft(kind, tmp_path / "plain"), wanted, kind)
    lt.fuse(base, source, output=tmp_path / "fused")
    found = type(model(kind)).from_pretrained(tmp_path / "fused").double().eval()
    assert_close(logits(found), wanted, kind)
    spectrum = lt.spectrum(source, base=base).to_dict()["modules"]
    assert next(m for m in spectrum if m["name"] == "lm_head")["base"]["relative_change"] > 0


def test_the_output_layer_of_an_encoder_and_a_decoder_is_named_with_the_next_step(tmp_path):
    trained("t5", tmp_path, target_modules=["q", "lm_head"], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(AdapterError, match="tied to an embedding that an encoder") as caught:
        lt.fuse(tmp_path / "base", tmp_path / "lora")
    pattern = caught.value.hint.rpartition(" ")[2].strip("'")
    lt.fuse(tmp_path / "base", tmp_path / "lora", drop=pattern, output=tmp_path / "fused")


def test_biases_of_a_saved_classifier_are_not_taken_for_further_tensors(tmp_path):
    options = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "bias": "all"}
    trained("roberta", tmp_path, **options)
    base, source, fused = (tmp_path / name for name in ("base", "lora", "fused"))
    wanted = with_peft("roberta", source)
    lt.fuse(base, source, output=fused)
    stored = [load_file(folder / "model.safetensors").keys() for folder in (base, fused)]
    assert stored[0] == stored[1]
    lt.extract(base, fused, rank=32, output=tmp_path / "again")
    for folder in (fused, tmp_path / "again"):
        if folder == fused:
            found = logits(type(model("roberta")).from_pretrained(folder).double().eval())
        else:
            found = with_peft("roberta", folder)
        assert_close(found, wanted, "roberta")


@pytest.mark.parametrize("infix", ["modules_to_save.default.", "modules_to_save."])
def test_a_saved_head_under_its_wrappers_name_replaces_the_head(infix, tmp_path):
    trained("llama", tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wanted = with_peft("llama", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {k.replace("lm_head.", f"lm_head.{infix}"): v for k, v in load_file(file).items()}
    save_file(renamed, file)
    lt.fuse(tmp_path / "base", tmp_path / "lora", output=tmp_path / "fused")
    found = type(model("llama")).from_pretrained(tmp_path / "fused").double().eval()
    assert_close(logits(found), wanted, "llama")
    result = lt.squeeze(tmp_path / "lora", energy=1.0, output=tmp_path / "as-saved")
    assert [f.code for f in result.findings] == ["wrapped-names"]
    assert_close(with_peft("llama", tmp_path / "as-saved"), wanted, "llama")


def test_a_bias_of_lora_b_is_no_dora_that_peft_loads(tmp_path):
    trained("gpt2", tmp_path, target_modules=["c_attn"], fan_in_fan_out=True, lora_bias=True)
    with pytest.raises(UnsupportedError, match="no DoRA with one"):
        lt.to_dora(tmp_path / "lora", base=tmp_path / "base", output=tmp_path / "dora")


def test_trained_tokens_of_a_live_model_are_read_under_its_adapters_name(tmp_path):
    trained("llama", tmp_path, target_modules=["q_proj"], trainable_token_indices=[1, 5])
    wanted = with_peft("llama", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    live = {
        key.replace(".weight", ".default.weight").replace("_delta", "_delta.default"): values
        for key, values in load_file(file).items()
    }
    assert sum("trainable_tokens_delta.default" in key for key in live) == 1
    save_file(live, file)
    lt.fuse(tmp_path / "base", tmp_path / "lora", output=tmp_path / "fused")
    found = type(model("llama")).from_pretrained(tmp_path / "fused").double().eval()
    assert_close(logits(found), wanted, "llama")
    lt.squeeze(tmp_path / "lora", energy=1.0, output=tmp_path / "as-saved")
    assert_close(with_peft("llama", tmp_path / "as-saved"), wanted, "llama")


def test_every_command_tells_of_a_tensor_that_none_applies(tmp_path):
    trained("llama", tmp_path, target_modules=["q_proj"])
    base, lora, fused = (tmp_path / name for name in ("base", "lora", "fused"))
    file = lora / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.factor"
    save_file({**load_file(file), key: np.ones(3, np.float32)}, file)
    for result in (
        lt.fuse(base, lora, output=fused),
        lt.verify(fused, base=base, adapters=lora),
        lt.squeeze(lora, rank=1),
        lt.merge([lora, lora]),
    ):
        (told,) = {finding for finding in result.findings if finding.code == "unknown-tensors"}
        assert key in told.message
    assert "tensor-dropped" in {f.code for f in lt.fuse(base, lora, output=tmp_path / "g").findings}
