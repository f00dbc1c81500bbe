"""What `info` tells of a file's training: from its metadata, and nothing that is not there."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from loratools.face.info import info
from loratools.operations.training_facts import training_facts

TAGS = {"10_mine": {"mystyle": 20, "cat": 3}, "1_reg": {"cat": 1, "dog": 2}}
METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "modelspec.title": "My style",
    "modelspec.trigger_phrase": "mystyle",
    "ss_output_name": "last",
    "ss_sd_model_name": "None",
    "ss_tag_frequency": json.dumps(TAGS),
    "ss_num_train_images": "20",
}


def test_of_several_keys_the_first_that_is_set_counts():
    facts = training_facts(METADATA)
    assert facts == {
        "title": "My style",
        "trigger words": "mystyle",
        "trained on": "sdxl_base_v1-0",
        "images": "20",
        "commonest tags": "mystyle, cat, dog",
    }


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": 1}', '{"a": {"b": true, "c": "x"}}', "[" * 9000, "1"]
)
def test_a_table_of_tags_that_is_none_tells_nothing(text):
    assert training_facts({"ss_tag_frequency": text}) == {}


def test_info_tells_components_apart(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for name in ("unet_mid_block_attentions_0_proj_in", "te1_text_model_encoder_layers_0_mlp_fc1"):
        for side, shape in (("down", (4, 16)), ("up", (16, 4))):
            values = rng.standard_normal(shape).astype(np.float32)
            tensors[f"lora_{name}.lora_{side}.weight"] = values
        tensors[f"lora_{name}.alpha"] = np.array(4, np.float32)
    save_file(tensors, tmp_path / "style.safetensors", metadata=METADATA)
    found = info(tmp_path / "style.safetensors")
    assert found.components == {"unet": 1, "te1": 1}
    assert found.training["title"] == "My style"
    assert found.to_dict()["training"] == training_facts(METADATA)
