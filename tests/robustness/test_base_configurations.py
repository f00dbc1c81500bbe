"""Bases whose configuration has values of other types than those that tell models apart."""

import json
import shutil
from pathlib import Path

import pytest

import loratools as lt
from loratools_formats.disk.errors import AdapterError

LLAMA = Path(__file__).parents[2] / "examples" / "tiny-llama"
WRONG = [
    {"model_type": []}, {"model_type": {"a": 1}}, {"model_type": 5}, {"quantization_config": []},
    {"quantization_config": "fp8"}, {"quantization_config": {"quant_method": ["fp8"]}},
]  # fmt: skip


@pytest.mark.parametrize("section", [None, "text_config"])
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_tells_models_apart_is_a_text(tmp_path, section, wrong):
    shutil.copytree(LLAMA / "model", tmp_path / "base")
    place = tmp_path / "base" / "config.json"
    config = json.loads(place.read_text()) | (wrong if section is None else {section: wrong})
    place.write_text(json.dumps(config))
    for call in (
        lambda: lt.fuse(tmp_path / "base", LLAMA / "lora"),
        lambda: lt.quantize(tmp_path / "base"),
    ):
        with pytest.raises(AdapterError, match=r"config value \w+ is wrong"):
            call()
