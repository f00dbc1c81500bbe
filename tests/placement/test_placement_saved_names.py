"""Every tensor that a class of transformers saves is found by the name it has in memory.

transformers 5 renames tensors back to their older names when it saves; the bytes tell whether the
tensor found is the right one. Nothing of PEFT is needed for that.
"""

import numpy as np
import placed_models
import pytest
from safetensors.numpy import load_file

from loratools.base.placement.names import Names
from loratools_formats.checkpoints.checkpoint import read_checkpoint

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = TEXT | {"model_type": "llama"}
BOTH = {"text_config": TEXT, "vision_config": VISION}
CLASSES = {
    "ViTForImageClassification": ("ViTConfig", VISION),
    "BeitForImageClassification": ("BeitConfig", VISION),
    "Dinov2ForImageClassification": (
        "Dinov2Config", {key: VISION[key] for key in VISION if key != "intermediate_size"},
    ),
    "CLIPModel": ("CLIPConfig", BOTH),
    "CLIPVisionModel": ("CLIPVisionConfig", VISION),
    "CLIPTextModel": ("CLIPTextConfig", TEXT),
    "SiglipModel": ("SiglipConfig", BOTH),
    "RobertaForSequenceClassification": ("RobertaConfig", TEXT),
    "XLMRobertaForMaskedLM": ("XLMRobertaConfig", TEXT),
    "ModernBertForMaskedLM": ("ModernBertConfig", TEXT),
    "OPTForCausalLM": ("OPTConfig", TEXT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 48},
    ),
    "GraniteMoeForCausalLM": (
        "GraniteMoeConfig", TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "PhimoeForCausalLM": (
        "PhimoeConfig", TEXT | {"num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "Idefics3ForConditionalGeneration": (
        "Idefics3Config", {"text_config": LLAMA, "vision_config": VISION},
    ),
    "LlavaNextForConditionalGeneration": (
        "LlavaNextConfig",
        {
            "text_config": LLAMA, "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 47,
        },
    ),
    "Llama4ForConditionalGeneration": (
        "Llama4Config",
        {
            "text_config": TEXT | {
                "intermediate_size_mlp": 24, "num_local_experts": 3, "head_dim": 8,
                "interleave_moe_layer_step": 1,
            },
            "vision_config": VISION | {
                "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
            },
        },
    ),
}  # fmt: skip
SMALL = [name for name in placed_models.BUILDERS if name not in ("llama_tied", "falcon_mqa")]


def check(model, folder):
    model.save_pretrained(folder)
    names = Names(read_checkpoint(folder))
    stored = load_file(folder / "model.safetensors")
    unseen = set(stored)
    tied = set(model.all_tied_weights_keys)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = names.find(name)
        if key is None:
            # Tied to another, or stacked from tensors that other tests put together.
            assert name in tied or ".experts." in name, name
            continue
        np.testing.assert_array_equal(stored[key], parameter.detach().numpy(), err_msg=name)
        unseen.discard(key)
    assert all(".experts." in key for key in unseen), unseen


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_other_families(tmp_path, name):
    import torch
    import transformers

    config, values = CLASSES[name]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = getattr(transformers, name)(getattr(transformers, config)(**values))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.reshape(-1)[0] = number + 0.5  # no two alike, whatever initialised them
    check(model, tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_models_of_the_other_tests(tmp_path, name):
    check(placed_models.build(name), tmp_path)
