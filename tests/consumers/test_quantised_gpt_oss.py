"""Packed experts of gpt-oss: transformers' own function says what they mean."""

import json

import numpy as np
import pytest

from loratools import fuse, verify
from loratools.base.codecs import Stored, coded_weights
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.tensors import in_memory


def test_values_are_those_of_transformers():
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    parts = {
        "x.experts.w_blocks": rng.integers(0, 256, (2, 96, 3, 16)).astype(np.uint8),
        "x.experts.w_scales": rng.integers(100, 140, (2, 96, 3)).astype(np.uint8),
    }
    want = convert_moe_packed_tensors(*map(torch.from_numpy, parts.values()))
    tensors = {key: in_memory(key, values) for key, values in parts.items()}
    (weight,) = coded_weights(Stored(tensors, {}, {})).values()
    got = weight.tensor().torch()
    assert got.shape == want.shape
    assert torch.equal(got.view(torch.int16), want.contiguous().view(torch.int16))


EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture
def packed(tmp_path):
    """Write a small gpt-oss with packed experts, and a LoRA of PEFT on its experts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=96, num_local_experts=4,
        num_experts_per_tok=2, dtype="bfloat16",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GptOssForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "base")
        names = [f"mlp.experts.{name}" for name in EXPERTS]
        settings = LoraConfig(
            r=4, lora_alpha=8, target_modules=[], target_parameters=names, init_lora_weights=False
        )
        get_peft_model(model, settings).save_pretrained(tmp_path / "lora")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    rng = np.random.default_rng(0)
    for key in [k for k in tensors if k.endswith(EXPERTS)]:
        experts, width, out = tensors.pop(key).shape
        codes = rng.integers(0, 256, (experts, out, width // 32, 16)).astype(np.uint8)
        scales = rng.integers(118, 124, (experts, out, width // 32)).astype(np.uint8)
        tensors |= {f"{key}_blocks": torch.from_numpy(codes)}
        tensors |= {f"{key}_scales": torch.from_numpy(scales)}
    save_file(tensors, file, metadata={"format": "pt"})
    stated = json.loads((tmp_path / "base" / "config.json").read_text())
    stated["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "base" / "config.json").write_text(json.dumps(stated))
    return tmp_path / "base", tmp_path / "lora"


def loaded(folder):
    """Return the parameters of the model that transformers makes of packed experts."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    plan = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=plan)
    return {key: value.double().numpy() for key, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_experts_that_are_written_back(packed, tmp_path):
    """transformers finds in the new codes what the report says, and nothing else changed."""
    base, lora = packed
    old = loaded(base)
    result = fuse(base, {lora: 0.2}, requantize=True, allow_lossy=True, output=tmp_path / "fused")
    fuse(base, {lora: 0.2}, dtype="f32", output=tmp_path / "plain")
    plain = read_checkpoint(tmp_path / "plain").tensors
    new = loaded(tmp_path / "fused")
    along = squared = off = 0.0
    for key, values in new.items():
        moved = values - old[key]
        if not key.endswith(EXPERTS):
            assert not moved.any(), key
            continue
        change = plain[key].load(np.float64) - old[key]
        along += np.vdot(moved, change)
        squared += np.vdot(change, change)
        off += np.square(moved - change).sum()
    assert result.surviving == pytest.approx(along / squared, rel=1e-3)
    assert result.quantising_error == pytest.approx(np.sqrt(off / squared), rel=1e-3)
    assert result.quantising_error < 1
    tensors = (read_checkpoint(folder).tensors for folder in (base, tmp_path / "fused"))
    before, after = ({k: bytes(t.raw()) for k, t in each.items()} for each in tensors)
    assert {k for k in before if before[k] != after[k]} == {
        f"model.layers.0.mlp.experts.{name}_blocks" for name in EXPERTS
    }


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_verify_tells_what_packed_experts_contain(packed, tmp_path):
    base, lora = packed
    fuse(base, {lora: 0.2}, output=tmp_path / "plain")
    fuse(base, {lora: 0.2}, requantize=True, allow_lossy=True, output=tmp_path / "packed")
    told = verify(tmp_path / "plain", base=base, adapters={lora: 0.2})
    assert told.contained is True
    assert told.counts["exact"] == len(read_checkpoint(tmp_path / "plain").tensors)
    for kept in (tmp_path / "packed", base):  # codes of four bits tell of no change
        found = verify(kept, base=base, adapters={lora: 0.2})
        assert found.contained is None
        unsure = {each.name for each in found.tensors if each.verdict == "not checked"}
        assert unsure == {f"model.layers.0.mlp.experts.{name}" for name in EXPERTS}
    found = verify(tmp_path / "plain", base=base, adapters={lora: 0.4})
    assert found.contained is False
    wrong = {each.name for each in found.tensors if each.verdict == "not contained"}
    assert wrong == unsure
