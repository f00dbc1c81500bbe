"""A fused classifier loads as one, and says what PEFT's model says."""

from __future__ import annotations

import json

import numpy as np
import pytest

import loratools

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 40, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "of_base", "targets", "labels"),
    [
        ("Llama", "ForCausalLM", ["q_proj", "v_proj"], 5),
        ("Bert", "ForPreTraining", ["query", "value"], 3),
    ],
)
def test_a_fused_classifier_loads_with_its_labels(tmp_path, family, of_base, targets, labels):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    getattr(transformers, family + of_base)(config).save_pretrained(tmp_path / "base")
    kind = getattr(transformers, f"{family}ForSequenceClassification")
    model = kind.from_pretrained(tmp_path / "base", num_labels=labels)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path / "lora")
    loratools.fuse(tmp_path / "base", tmp_path / "lora", output=tmp_path / "fused")
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert written["architectures"] == [f"{family}ForSequenceClassification"]
    assert len(written["id2label"]) == len(written["label2id"]) == labels
    fused = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "fused")
    assert fused.config.num_labels == labels
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        want, got = model(tokens).logits.numpy(), fused.eval()(tokens).logits.numpy()
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("family", "task", "targets"),
    [
        ("Llama", "Sequence", ["q_proj"]),
        ("Roberta", "Sequence", ["query"]),
        ("Bert", "Token", ["query"]),
    ],
)
def test_a_head_of_other_labels_takes_the_place_of_the_base_s(tmp_path, family, task, targets):
    torch.manual_seed(0)
    kind = getattr(transformers, f"{family}For{task}Classification")
    names = {0: "a", 1: "b", 2: "c"}
    config = getattr(transformers, f"{family}Config")(**SIZES, num_labels=3, id2label=names)
    kind(config).save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    code = {"Sequence": "SEQ_CLS", "Token": "TOKEN_CLS"}[task]
    settings = peft.LoraConfig(task_type=code, r=4, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(model, settings).eval()
    model.save_pretrained(tmp_path / "lora")
    loratools.fuse(tmp_path / "base", tmp_path / "lora", output=tmp_path / "fused")
    fused = kind.from_pretrained(tmp_path / "fused").eval()
    assert len(fused.config.id2label) == 5
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        want, got = model(tokens).logits.numpy(), fused(tokens).logits.numpy()
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


MORE = {
    "XLNet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_head": 8, "d_inner": 24},
    **{key: {"emb_dim": 16, "n_layers": 1, "n_heads": 2} for key in ("XLM", "Flaubert")},
}


@pytest.mark.parametrize(
    ("family", "of_base", "task", "target"),
    [
        ("Llama", "ForCausalLM", "Sequence", "q_proj"),
        ("Bert", "ForMaskedLM", "Sequence", "query"),  # whose pooler only the classifier has
        ("Roberta", "ForMaskedLM", "Sequence", "query"),  # whose head is of two layers
        ("Bert", "ForMaskedLM", "Token", "query"),
        ("XLNet", "LMHeadModel", "Sequence", "ff.layer_1"),  # whose head has a layer in front
        ("XLM", "WithLMHeadModel", "Sequence", "q_lin"),
        ("Flaubert", "WithLMHeadModel", "Sequence", "q_lin"),
    ],
)
def test_a_head_that_the_base_lacks_is_extracted_and_fused(tmp_path, family, of_base, task, target):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | MORE.get(family, {}))
    base = getattr(transformers, family + of_base)(config)
    base.save_pretrained(tmp_path / "base")
    kind = getattr(transformers, f"{family}For{task}Classification")
    tuned = kind.from_pretrained(tmp_path / "base", num_labels=3).eval()
    with torch.no_grad():
        for name, values in tuned.named_parameters():
            if f"{target}.weight" in name:
                out, in_ = values.shape
                values.add_(torch.outer(torch.randn(out), torch.randn(in_)), alpha=0.05)
            elif any(part in name for part in ("classifier", "pooler", "summary", "logits_proj")):
                values.normal_()
    tuned.save_pretrained(tmp_path / "tuned")
    done = loratools.extract(
        tmp_path / "base", tmp_path / "tuned", output=tmp_path / "lora", rank=2
    )
    assert {finding.code for finding in done.findings} >= {"head-carried", "one-sided-skipped"}
    loaded = peft.PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "lora"
    ).eval()
    loratools.fuse(tmp_path / "base", tmp_path / "lora", output=tmp_path / "fused")
    fused = kind.from_pretrained(tmp_path / "fused").eval()
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        want = tuned(tokens).logits.numpy()
        for model in (loaded, fused):
            got = model(tokens).logits.numpy()
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
