"""Tied embeddings: what the live adapter computes, the checkpoint must hold.

Measured with peft 0.21.2 on a tied Llama, GPT-2, BERT and Gemma 3: every case compares logits.
"""

import json

import numpy as np
import placed_models
import pytest
from placed_headers import adapter, checkpoint, dora, linear, placed, replacing
from placed_peft import WARNINGS, compared, load, logits, save_adapter, save_base
from placed_reference import fused

from loratools.base.placement import place
from loratools_formats.core.adapter import Replacement
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError, UnsupportedError

pytestmark = [pytest.mark.filterwarnings(message) for message in WARNINGS]

EMBEDDING = {"llama_tied": "embed_tokens", "gpt2": "wte", "gemma3": "embed_tokens"}
OTHER = {"llama_tied": "q_proj", "gpt2": "c_fc", "gemma3": "q_proj"}


def grown(model):
    model.resize_token_embeddings(53, mean_resizing=False)


@pytest.mark.parametrize("name", EMBEDDING)
@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"target_modules": ["EMB"]}, True),
        ({"target_modules": ["lm_head"]}, True),
        ({"target_modules": ["EMB", "lm_head", "OTHER"]}, True),
        ({"target_modules": ["EMB", "lm_head"], "use_dora": True}, True),
        ({"target_modules": ["OTHER"], "modules_to_save": ["EMB"]}, True),
        ({"target_modules": ["OTHER"], "modules_to_save": ["lm_head"]}, True),
        ({"target_modules": ["OTHER"], "modules_to_save": ["EMB", "lm_head"]}, True),
        (
            {
                "target_modules": ["OTHER"], "modules_to_save": ["lm_head"],
                "ensure_weight_tying": True,
            },
            False,
        ),
        ({"target_modules": ["OTHER"], "trainable_token_indices": {"EMB": [3, 9]}}, False),
        ({"target_modules": ["OTHER"], "trainable_token_indices": {"lm_head": [3, 9]}}, True),
        (
            {
                "target_modules": ["OTHER"],
                "trainable_token_indices": {"EMB": [3, 9], "lm_head": [3, 9]},
            },
            False,
        ),
        (
            {
                "target_modules": ["OTHER"],
                "trainable_token_indices": {"EMB": [3, 9], "lm_head": [4, 9]},
            },
            True,
        ),
        (
            {
                "target_modules": ["lm_head", "OTHER"],
                "trainable_token_indices": {"EMB": [3, 9]},
            },
            True,
        ),
    ],
    ids=[
        "embedding", "head", "both", "dora on both", "embedding saved", "head saved",
        "both saved", "saved and tied", "rows", "head rows", "same rows", "other rows",
        "rows and head",
    ],
)  # fmt: skip
def test_layers_part_where_the_live_ones_do(tmp_path, name, config, parts):
    def filled(value):
        if isinstance(value, dict):
            return {filled(key): inner for key, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return {"EMB": EMBEDDING[name], "OTHER": OTHER[name]}.get(value, value)

    answers, placements = compared(
        name, tmp_path, **{key: filled(value) for key, value in config.items()}
    )
    assert answers.agree()
    assert bool(placements.untied) is parts
    assert any(each.code == "untied" for each in placements.findings) is parts


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_equal_changes_of_both_stay_one(tmp_path, target):
    answers, placements = compared(
        "llama_tied", tmp_path, target_modules=[target, "q_proj"], ensure_weight_tying=True
    )
    assert answers.agree()
    assert not placements.untied
    assert [p.key for p in placements.deltas].count("model.embed_tokens.weight") == 1
    assert placements.findings[0].code == "stays-tied"


def test_equal_changes_that_peft_does_not_load_for_gpt2_stay_one(tmp_path):
    """PEFT 0.21.2 trains and saves both layers of GPT-2, but ties only one when it loads them."""
    base = save_base(placed_models.build("gpt2"), tmp_path / "base")
    trained = save_adapter(
        "gpt2", tmp_path / "adapter", target_modules=["lm_head"], ensure_weight_tying=True
    )
    assert not fused(base, tmp_path / "adapter", tmp_path / "fused").untied
    np.testing.assert_allclose(
        logits(load("gpt2", tmp_path / "fused")), logits(trained), atol=1e-12
    )


def test_ensure_weight_tying_that_ties_nothing_is_not_believed(tmp_path):
    """PEFT 0.21.2 does not tie GPT-2 when its embedding is the target."""
    answers, placements = compared(
        "gpt2", tmp_path, target_modules=["wte"], ensure_weight_tying=True
    )
    assert answers.agree()
    assert placements.untied == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_a_resized_vocabulary_takes_its_partner_along(tmp_path, targets):
    base = save_base(placed_models.build("llama_tied"), tmp_path / "base")
    live = save_adapter("llama_tied", tmp_path / "adapter", grown, target_modules=targets)
    placements = fused(base, tmp_path / "adapter", tmp_path / "fused")
    path = tmp_path / "fused" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 53}))
    assert bool(placements.untied) is ("embed_tokens" in targets)
    np.testing.assert_allclose(
        logits(load("llama_tied", tmp_path / "fused")), logits(live), atol=1e-12
    )


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["word_embeddings"]},
        {"target_modules": ["decoder"]},
        {"target_modules": ["query"], "modules_to_save": ["decoder"]},
    ],
    ids=["embedding", "head", "head saved"],
)
def test_a_head_whose_bias_is_tied_too(tmp_path, config):
    answers, placements = compared("bert_mlm", tmp_path, **config)
    assert answers.agree()
    assert placements.untied == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def test_a_gpt2_without_its_prefix(tmp_path):
    """The original files of GPT-2 name `wte.weight`, and transformers loads a head beside it."""
    from safetensors.numpy import load_file, save_file

    base = save_base(placed_models.build("gpt2"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    bare = {key.removeprefix("transformer."): array for key, array in tensors.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    live = save_adapter("gpt2", tmp_path / "adapter", target_modules=["wte", "c_attn"])
    placements = fused(base, tmp_path / "adapter", tmp_path / "fused")
    assert placements.untied == {"lm_head.weight": "wte.weight"}
    np.testing.assert_allclose(logits(load("gpt2", tmp_path / "fused")), logits(live), atol=1e-12)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
EMB = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        (LLAMA | {"tie_word_embeddings": True}, True),
        (LLAMA, True),
        (LLAMA | {"text_config": {"tie_word_embeddings": True}}, True),
        (LLAMA | {"tie_word_embeddings": False}, False),
        (LLAMA | {"text_config": {"tie_word_embeddings": False}}, False),
        (LLAMA | {"architectures": ["LlamaModel"]}, False),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, False),
        ({}, False),
    ],
)
def test_what_a_config_says(config, is_tied):
    base = checkpoint({EMB: (9, 4)}, **config)
    result = placed({"model.embed_tokens": linear(4, 9, kind="embedding")}, base)
    assert bool(result.untied) is is_tied
    head = {"lm_head": linear(9, 4)}
    if is_tied:
        assert placed(head, base).deltas[0].key == "lm_head.weight"
    else:
        with pytest.raises(AdapterError, match="no base tensor fits"):
            placed(head, base)


def test_the_bias_of_a_settled_module_is_not_lost():
    base = checkpoint({EMB: (9, 4)}, **LLAMA)
    with pytest.raises(AdapterError, match="bias that the base does not have"):
        placed({"lm_head": linear(9, 4, bias=True)}, base)


def test_a_base_that_stores_both_though_tied():
    tensors = {EMB: (9, 4), "lm_head.weight": (9, 4)}
    base = checkpoint(tensors, **LLAMA | {"tie_word_embeddings": True})
    with pytest.raises(UnsupportedError, match="yet it stores both"):
        placed({"lm_head": linear(9, 4)}, base)
    rows = replacing("token_rows", EMB, (2, 4), (1, 3))
    result = place(adapter({}, r=rows), base)
    assert [key for key, _ in result.replacements] == [EMB, "lm_head.weight"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_encoder_and_decoder_share_is_refused(tied):
    base = checkpoint(
        {"shared.weight": (9, 4)}, model_type="t5", is_encoder_decoder=True,
        architectures=["T5ForConditionalGeneration"], tie_word_embeddings=tied,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="share this embedding"):
        placed({"shared": linear(4, 9, kind="embedding")}, base)


def test_replacements_are_equal_by_bytes():
    values = np.arange(36, dtype=np.float32).reshape(9, 4)
    base = checkpoint({EMB: (9, 4)}, **LLAMA)

    def saved(head):
        return place(
            adapter(
                {},
                e=Replacement("module", EMB, in_memory("e", values)),
                h=Replacement("module", "lm_head.weight", in_memory("h", head)),
            ),
            base,
        )

    assert not saved(values).untied
    assert [key for key, _ in saved(values).replacements] == [EMB]
    changed = values.copy()
    changed[8, 3] += 1
    assert [key for key, _ in saved(changed).replacements] == [EMB, "lm_head.weight"]


def test_a_dora_on_the_head_alone_unties():
    base = checkpoint({EMB: (9, 4)}, **LLAMA)
    assert placed({"lm_head": dora(9, 4)}, base).untied == {"lm_head.weight": EMB}


def test_mirrored_factors_with_other_scales_are_two_changes():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9)), rng.standard_normal((4, 2))
    embedding = LowRank(in_memory("a", a), in_memory("b", b), 1.0, Layer("embedding"))
    base = checkpoint({EMB: (9, 4)}, **LLAMA)
    for scale, parts in ((1.0, False), (2.0, True)):
        head = LowRank(in_memory("a", b.T.copy()), in_memory("b", a.T.copy()), scale)
        changes = {"model.embed_tokens": ModuleChange(embedding), "lm_head": ModuleChange(head)}
        result = placed(changes, base)
        assert bool(result.untied) is parts


def test_a_tied_layer_under_two_names_is_refused():
    base = checkpoint({EMB: (9, 4)}, **LLAMA)
    change = linear(4, 9, kind="embedding")
    with pytest.raises(AdapterError, match=r"one layer twice.*model\.embed_tokens, embed_tokens"):
        placed({"model.embed_tokens": change, "embed_tokens": change}, base)
    with pytest.raises(AdapterError, match="one layer twice"):
        place(
            adapter(
                {},
                one=replacing("module", EMB, (9, 4)),
                other=replacing("module", "embed_tokens.weight", (9, 4)),
            ),
            base,
        )
