"""Adapters of QLoRA, fused into what their base was while they were trained."""

import json
import shutil

import numpy as np
import pytest

import loratools as lt
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import OptionError

BASE, LORA = "examples/tiny-llama/model", "examples/tiny-llama/lora"


def values(folder):
    return {k: t.load(np.float64) for k, t in read_checkpoint(folder).tensors.items()}


def raw(folder):
    return {k: bytes(t.raw()) for k, t in read_checkpoint(folder).tensors.items()}


@pytest.mark.parametrize("spelling", ["nf4", "nf4:double", "fp4"])
def test_it_is_as_if_the_base_had_been_quantised(spelling, tmp_path):
    """Every tensor is what fusing into the quantised base gives, touched or not."""
    kind, _, double = spelling.partition(":")
    lt.quantize(BASE, quant_type=kind, double_quant=bool(double), output=tmp_path / "q")
    lt.fuse(tmp_path / "q", LORA, base_mode="dequant", output=tmp_path / "by-quantising")
    result = lt.fuse(BASE, LORA, trained_on=spelling, output=tmp_path / "fused")
    assert raw(tmp_path / "fused") == raw(tmp_path / "by-quantising")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert "quantization_config" not in config
    before, lora = values(BASE), lt.read(LORA)
    lt.dequantize(tmp_path / "q", output=tmp_path / "plain")
    after = values(tmp_path / "plain")
    names = {tensor.name for tensor in result.tensors}
    moved = sum(np.square(after[k] - before[k]).sum() for k in names)
    delta = sum(np.square(lt.delta(lora, name)).sum() for name in lora.modules)
    assert result.base_rounding == pytest.approx(np.sqrt(moved / delta), rel=1e-6)
    untouched = {k for k in before if k not in names and not np.array_equal(before[k], after[k])}
    assert result.converted >= len(untouched)


def test_the_base_stays_where_nothing_was_trained_in_four_bits(tmp_path):
    result = lt.fuse(BASE, LORA, output=tmp_path / "fused")
    assert result.base_rounding is None
    assert result.to_dict()["base_rounding"] is None


def test_what_it_refuses(tmp_path):
    with pytest.raises(OptionError, match=r"no such format.*int3.*nf4:double"):
        lt.fuse(BASE, LORA, trained_on="int3")
    lt.quantize(BASE, output=tmp_path / "q")
    with pytest.raises(OptionError, match="no meaning for a quantised base"):
        lt.fuse(tmp_path / "q", LORA, trained_on="nf4")


CARD = """---
library_name: peft
---
## Training procedure
The following `bitsandbytes` quantization config was used during training:
- load_in_8bit: False
- load_in_4bit: True
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: {double}
"""


def copy_of(folder, base=None, card=None):
    shutil.copytree(LORA, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    if base is not None:
        config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(card or "# An adapter\n")
    return folder


@pytest.mark.parametrize(
    ("base", "card", "spelling"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", None, "nf4:double"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit", None, "nf4:double"),
        ("someone/model-nf4", None, "nf4:double"),
        (None, CARD.format(double="True"), "nf4:double"),
        (None, CARD.format(double="False"), "nf4"),
        ("meta-llama/Llama-3.1-8B", None, None),
        ("mlx-community/Llama-3-8B-4bit", None, None),
        (None, CARD.format(double="False").replace(" nf4", " fp4"), "fp4"),
        (None, CARD.replace("4bit: True", "4bit: False"), None),
    ],
)
def test_an_adapters_own_files_tell_of_four_bits(base, card, spelling, tmp_path):
    adapter = copy_of(tmp_path / "lora", base, card)
    plan = lt.fuse(BASE, adapter)
    found = [each.message for each in plan.findings if each.code == "trained-on-four-bits"]
    assert bool(found) == (spelling is not None)
    if spelling is not None:
        assert f'trained_on="{spelling}"' in found[0]
        again = lt.fuse(BASE, adapter, trained_on=spelling)
        assert not [each for each in again.findings if each.code == "trained-on-four-bits"]


def test_a_folder_that_was_trained_on_tells(tmp_path):
    lt.quantize(BASE, double_quant=False, output=tmp_path / "base")
    adapter = copy_of(tmp_path / "lora", str(tmp_path / "base"))
    plan = lt.fuse(BASE, adapter)
    assert any('trained_on="nf4"' in each.message for each in plan.findings)
