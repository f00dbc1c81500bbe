"""Fused by placements, a checkpoint answers as the live adapter does; PEFT and transformers judge.

The adapters are PEFT's own, the checkpoints transformers' own; only the sum is ours, dense in
float64 (`placed_reference`).
"""

import numpy as np
import placed_models
import pytest
from placed_peft import (
    WARNINGS,
    compared,
    copy_config,
    load,
    loaded_adapter,
    logits,
    save_adapter,
    save_as_held,
    save_base,
    write_adapter,
)
from placed_reference import fused
from safetensors.numpy import load_file, save_file

pytestmark = [pytest.mark.filterwarnings(message) for message in WARNINGS]

EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
LINEAR = {"target_modules": "all-linear"}
CASES = [
    *[(name, LINEAR) for name in (
        "llama", "qwen2", "gemma2", "phi3", "gpt_neox", "bloom", "falcon", "gpt_bigcode", "gpt2",
        "bert", "bert_mlm", "llava", "gemma3", "qwen2_vl",
    )],
    *[(name, LINEAR) for name in ("mixtral", "mixtral_single", "qwen3_moe", "olmoe")],
    *[(name, EXPERTS) for name in ("mixtral", "mixtral_single", "qwen3_moe", "olmoe", "gpt_oss")],
    ("gpt_neox", {"target_modules": ["lm_head", "embed_in", "dense"]}),
    ("llava", LINEAR | {"use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "lora_bias": True, "bias": "lora_only"}),
    ("bert", {
        "target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "all",
    }),
    ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["norm"]}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
)
def test_fused_checkpoints_answer_as_the_live_adapter(tmp_path, name, config):
    answers, placements = compared(name, tmp_path, **config)
    assert answers.agree()
    assert not placements.untied


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_vision_layers_change_as_peft_merges_them(tmp_path, name):
    base = save_base(placed_models.build(name), tmp_path / "base")
    save_adapter(
        name,
        tmp_path / "adapter",
        target_modules=r".*(vision_tower|visual)\..*(q_proj|qkv|fc1|patch_embed\w*\.proj)",
    )
    placements = fused(base, tmp_path / "adapter", tmp_path / "fused")
    assert placements.deltas
    found = load(name, tmp_path / "fused").state_dict()
    merged = loaded_adapter(name, tmp_path / "adapter").merge_and_unload().state_dict()
    before = placed_models.build(name).state_dict()
    assert found.keys() == merged.keys()
    moved = {key for key in found if not np.array_equal(merged[key], before[key])}
    assert len(moved) == len(placements.deltas)
    for key, tensor in merged.items():
        np.testing.assert_allclose(found[key].numpy(), tensor.numpy(), atol=1e-12)


@pytest.mark.parametrize("held", [False, True], ids=["an expert each", "stacked"])
@pytest.mark.parametrize(
    ("name", "stack", "leaves"),
    [
        ("mixtral", "model.layers.{}.block_sparse_moe.experts", ("w1", "w3", "w2")),
        ("olmoe", "model.layers.{}.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_in_both_layouts_on_both_layouts(tmp_path, name, stack, leaves, held):
    """PEFT turns adapters of transformers 4 into stacked ones when it loads them: its judgement."""
    save = save_as_held if held else save_base
    (tmp_path / "base").mkdir()
    base = save(placed_models.build(name), tmp_path / "base")
    modules = {
        f"{stack.format(layer)}.{expert}.{leaf}": shape
        for layer in range(2)
        for expert in range(3)
        for leaf, shape in zip(leaves, ((24, 16), (24, 16), (16, 24)), strict=True)
    }
    write_adapter(tmp_path / "each", modules)
    save_adapter(name, tmp_path / "stacks", **EXPERTS)
    bare = logits(placed_models.build(name))
    for adapter in ("each", "stacks"):
        fused(base, tmp_path / adapter, tmp_path / f"fused-{adapter}")
        want = logits(loaded_adapter(name, tmp_path / adapter))
        got = logits(load(name, tmp_path / f"fused-{adapter}"))
        assert np.abs(want - bare).max() > 0.1
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_a_stack_of_one_expert(tmp_path):
    (tmp_path / "base").mkdir()
    base = save_as_held(placed_models.build("mixtral_single"), tmp_path / "base")
    live = save_adapter("mixtral_single", tmp_path / "adapter", **EXPERTS)
    placements = fused(base, tmp_path / "adapter", tmp_path / "fused")
    placed = {(p.plane, p.expert) for p in placements.deltas if ".experts." in p.key}
    assert placed == {(None, None)}  # the whole stack, as of several
    got = logits(load("mixtral_single", tmp_path / "fused"))
    np.testing.assert_allclose(got, logits(live), atol=1e-12)


def _as_phi3(llama, folder):
    """Write a Llama as the Phi-3 that computes the same."""
    tensors = load_file(llama / "model.safetensors")
    for layer in range(2):
        for fused_name, parts in (
            ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
        ):
            prefix = f"model.layers.{layer}.{fused_name.partition('.')[0]}"
            tensors[f"model.layers.{layer}.{fused_name}.weight"] = np.concatenate(
                [tensors.pop(f"{prefix}.{part}.weight") for part in parts]
            )
    copy_config(llama, folder, model_type="phi3", architectures=["Phi3ForCausalLM"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("use_dora", [False, True])
def test_split_adapters_on_fused_weights(tmp_path, use_dora):
    llama = save_base(placed_models.build("llama"), tmp_path / "llama")
    phi3 = _as_phi3(llama, tmp_path / "phi3")
    bare = logits(placed_models.build("llama"))
    np.testing.assert_allclose(logits(load("phi3", phi3)), bare, atol=1e-12)
    live = save_adapter(
        "llama",
        tmp_path / "adapter",
        target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"],
        use_dora=use_dora,
    )
    placements = fused(phi3, tmp_path / "adapter", tmp_path / "fused")
    assert all(placement.outputs for placement in placements.deltas)
    np.testing.assert_allclose(logits(load("phi3", tmp_path / "fused")), logits(live), atol=1e-12)


@pytest.mark.parametrize("use_dora", [False, True])
def test_fused_adapters_on_split_weights(tmp_path, use_dora):
    from peft import PeftModel

    llama = save_base(placed_models.build("llama"), tmp_path / "llama")
    phi3 = _as_phi3(llama, tmp_path / "phi3")
    save_adapter(
        "phi3",
        tmp_path / "adapter",
        target_modules=["qkv_proj", "gate_up_proj", "o_proj"],
        use_dora=use_dora,
    )
    live = PeftModel.from_pretrained(load("phi3", phi3), str(tmp_path / "adapter")).double().eval()
    placements = fused(llama, tmp_path / "adapter", tmp_path / "fused")
    assert len(placements.deltas) == 2 * (3 + 2 + 1)
    np.testing.assert_allclose(logits(load("llama", tmp_path / "fused")), logits(live), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "fused_name", "sizes", "still"),
    [
        # Of each head, how many of the last dimensions carry no rotation.
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", (16, 16, 16), 2),
        ("bloom", "transformer.h.0.self_attention.query_key_value", (16, 16, 16), 4),
        ("falcon", "transformer.h.0.self_attention.query_key_value", (16, 8, 8), 4),
        ("falcon_mha", "transformer.h.0.self_attention.query_key_value", (16, 16, 16), 4),
        ("falcon_mqa", "transformer.h.0.self_attention.query_key_value", (16, 4, 4), 4),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn", (16, 4, 4), 4),
        ("gpt_bigcode_mha", "transformer.h.0.attn.c_attn", (16, 16, 16), 4),
        ("gpt2", "transformer.h.0.attn.c_attn", (16, 16, 16), 8),
    ],
)
def test_spans_are_the_queries_keys_and_values_that_the_model_computes(
    tmp_path, name, fused_name, sizes, still
):
    """Attention itself tells them apart.

    A number added to all keys changes no softmax, one added to queries does; and a value's bias
    passes through linearly, whatever the queries.
    """
    import torch
    from placed_headers import linear

    from loratools.base.placement import place
    from loratools_formats.checkpoints.checkpoint import read_checkpoint
    from loratools_formats.core.adapter import Adapter

    model = placed_models.build(name)
    base = read_checkpoint(save_base(model, tmp_path / "base"))
    parent = fused_name.rpartition(".")[0]
    modules = {
        f"{parent}.{leaf}": linear(size, 16)
        for leaf, size in zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True)
    }
    rows = {
        placement.module.rpartition(".")[2]: [
            row for start, stop in placement.outputs for row in range(start, stop)
        ]
        for placement in place(Adapter("peft", None, modules), base).deltas
    }
    bias = model.get_submodule(fused_name).bias
    head = 8 if name == "gpt2" else 4
    plain = logits(model)

    def answer(part):
        where = [row for i, row in enumerate(rows[part]) if i % head >= head - still]
        with torch.no_grad():
            bias[where] += 2
            result = logits(model)
            bias[where] -= 2
        return result

    # Bloom's softmax is in float32.
    np.testing.assert_allclose(answer("k_proj"), plain, atol=1e-5)
    assert np.abs(answer("q_proj") - plain).max() > 1e-3
    assert np.abs(answer("v_proj") - plain).max() > 1e-3
    # Without values nothing of the other two is left.
    with torch.no_grad():
        weight = model.get_submodule(fused_name).weight
        (weight.T if name == "gpt2" else weight)[rows["v_proj"]] = 0
        bias[rows["v_proj"]] = 0
    np.testing.assert_allclose(answer("q_proj"), logits(model), atol=1e-5)


def test_a_classifier_on_the_checkpoint_of_a_body(tmp_path):
    model = placed_models.build("bert")
    base = save_base(model.bert, tmp_path / "base")
    live = save_adapter(
        "bert", tmp_path / "adapter", target_modules=["query"], modules_to_save=["classifier"]
    )
    placements = fused(base, tmp_path / "adapter", tmp_path / "fused")
    assert "classifier.weight" in {key for key, _ in placements.replacements}
    assert "tensor-added" in [finding.code for finding in placements.findings]
    copy_config(tmp_path / "base", tmp_path / "fused", num_labels=3)
    found = load("bert", tmp_path / "fused")
    np.testing.assert_allclose(logits(found), logits(live), atol=1e-12)
