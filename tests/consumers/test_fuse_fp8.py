"""Bases in eight-bit floats: transformers and PEFT judge what is made of them."""

import json

import fuse_oracle
import numpy as np
import peft_oracle as oracle
import pytest
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.WARNINGS]

BLOCK = 128
TARGETS = ["q_proj", "down_proj"]


def in_blocks(weight):
    """Return the codes of a weight and the scale of each block, as DeepSeek stores them."""
    import torch

    out, in_ = weight.shape
    blocks = weight.float().view(out // BLOCK, BLOCK, in_ // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view(out, in_).to(torch.float8_e4m3fn)
    return codes.contiguous(), scale


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Llama whose projections are in FP8, its scales in another shard."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("fp8") / "base"
    folder.mkdir()
    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=256, intermediate_size=384, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, initializer_range=0.2, tie_word_embeddings=False,
        dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    weights, scales = {}, {}
    for key, tensor in state.items():
        if "proj" in key:
            weights[key], scales[f"{key}_scale_inv"] = in_blocks(tensor)
        else:
            weights[key] = tensor.contiguous()
    index = {}
    for name, tensors in {"model-1.safetensors": weights, "model-2.safetensors": scales}.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    )
    quantization = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    }  # fmt: skip
    values = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    return folder


def dequantised(base, dtype):
    """Load the base as transformers understands it."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    return AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        dtype=getattr(torch, dtype),
    )


@pytest.fixture(scope="module")
def adapted(base):
    """A live adapter over the base in float32, saved beside it."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    live = get_peft_model(dequantised(base, "float32"), config)
    oracle.fill(live, 0)
    live.save_pretrained(base.parent / "adapter")
    return base.parent / "adapter", live.to(torch.float32).eval()


def test_what_no_adapter_changes_is_what_transformers_reads(base, adapted, tmp_path):
    import torch

    fuse_oracle.fuse(base, adapted[0], "-o", tmp_path / "out")
    fused = load(tmp_path / "out")
    want = dequantised(base, "bfloat16").state_dict()
    assert fused.keys() == want.keys()
    untouched = [key for key in want if not any(f".{target}." in key for target in TARGETS)]
    assert sum("proj" in key for key in untouched) == 10
    for key in untouched:
        assert fused[key].dtype == torch.bfloat16
        assert torch.equal(fused[key], want[key]), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_float32_answers_as_the_adapter_live(base, adapted, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder, live = adapted
    fuse_oracle.fuse(base, folder, "-o", tmp_path / "out", "--dtype", "f32")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad(), live.disable_adapter():
        bare = live(tokens).logits.numpy()
    with torch.no_grad():
        want, got = live(tokens).logits.numpy(), fused(tokens).logits.numpy()
    assert np.abs(want - bare).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_what_keeps_the_format_answers_as_the_sum_to_its_rounding(base, adapted, tmp_path):
    """transformers loads it; weights are the base's and ΔW, and logits, as near as is reported."""
    import torch

    from loratools import fuse

    folder, _ = adapted
    before = dequantised(base, "float32").float()
    fuse_oracle.fuse(base, folder, "-o", tmp_path / "plain", "--dtype", "f32")
    exact = load(tmp_path / "plain")
    kept = tmp_path / "kept"
    result = fuse(base, folder, requantize=True, allow_lossy=True, output=kept)
    fused = dequantised(kept, "float32").float()
    after = fused.state_dict()
    along = squared = off = 0.0
    for key, old in before.state_dict().items():
        moved, change = after[key].double() - old.double(), exact[key].double() - old.double()
        if not any(f".{target}." in key for target in TARGETS):
            assert not moved.any(), key
            continue
        along += float((moved * change).sum())
        squared += float(change.square().sum())
        off += float((moved - change).square().sum())
    assert result.surviving == pytest.approx(along / squared, rel=1e-3)
    assert result.quantising_error == pytest.approx((off / squared) ** 0.5, rel=1e-3)
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        start, got = before(tokens).logits, fused(tokens).logits
        before.load_state_dict(exact)
        want = before(tokens).logits
    apart = float((got - want).norm() / (want - start).norm())
    assert apart < 2 * result.quantising_error


def load(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found
