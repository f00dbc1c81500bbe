"""Bases that compressed-tensors quantised: fused, kept in their format, loaded by transformers."""

import json

import numpy as np
import peft_oracle as oracle
import pytest

from loratools import fuse
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint

IGNORED = [*oracle.WARNINGS, "ignore:You passed `quantization_config`:UserWarning"]
pytestmark = [pytest.mark.filterwarnings(line) for line in IGNORED]
pytest.importorskip("compressed_tensors")

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
INT = {"type": "int", "symmetric": True}
BYTES = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
E4M3 = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
FLOAT = {"type": "float", "strategy": "group", "group_size": 32}
BLOCK = 64
SCHEMES = {
    "int4": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "group", "group_size": 32}),
    "int8": ("pack-quantized", {**INT, "num_bits": 8, "strategy": "group", "group_size": 32}),
    "W8A8": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}),
    "FP8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "FP8 blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]},
    ),
    "MXFP4": ("mxfp4-pack-quantized", {**FLOAT, **BYTES, "num_bits": 4}),
    "MXFP8": ("mxfp8-quantized", {**FLOAT, **BYTES, "num_bits": 8}),
    "NVFP4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, **E4M3},
    ),
}


@pytest.fixture(scope="module")
def model():
    """A small Llama in BF16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, initializer_range=0.1, tie_word_embeddings=False,
        dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(params=SCHEMES)
def base(request, model, tmp_path):
    """Write the model with its linear layers compressed by the library, as llm-compressor does."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import save_file

    name, arguments = SCHEMES[request.param]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    compressor = BaseCompressor.get_value_from_registry(name)
    tensors = {}
    for key, weight in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or not module.endswith("_proj"):
            tensors[key] = weight.contiguous()
            continue
        state = {"weight": weight.detach(), **scales_of(weight.detach(), arguments)}
        packed = compressor.compress(state, scheme)
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in packed.items()}
    folder = tmp_path / "base"
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scales_of(weight, arguments):
    """Return scales with which no value is beyond the last code."""
    import torch

    if arguments["type"] == "int":
        top = 2 ** (arguments["num_bits"] - 1) - 0.5
    else:
        top = 448 if arguments["num_bits"] == 8 else 6
    rows, width = (BLOCK, BLOCK) if "block_structure" in arguments else (1, weight.shape[1])
    width = arguments.get("group_size", width)
    blocks = weight.float().reshape(len(weight) // rows, rows, -1, width)
    scale = blocks.abs().amax((1, 3)) / top
    if arguments.get("scale_dtype") == "torch.uint8":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    if arguments.get("strategy") != "tensor_group":
        return {"weight_scale": scale.to(torch.bfloat16)}
    of_all = 448 / scale.max()
    narrow = (scale * of_all).to(torch.float8_e4m3fn).to(torch.bfloat16)
    return {"weight_scale": narrow, "weight_global_scale": of_all.reshape(1)}


@pytest.fixture
def adapter(make_folder):
    return make_folder(modules={Q: (128, 128, 8), DOWN: (128, 256, 8)}, dtype="f32")


def loaded(folder):
    """Load by transformers, which dequantises by compressed-tensors."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    plan = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=plan).eval()


def logits(model):
    import torch

    with torch.no_grad():
        return model.float()(torch.tensor([[1, 7, 9, 30, 2]])).logits.double().numpy()


def test_a_fused_base_that_keeps_its_format(base, adapter, tmp_path):
    """transformers makes of it the base's weights and ΔW, as near as the report says."""
    import torch

    plain = loaded(base)
    old = {key: value.double().numpy() for key, value in plain.state_dict().items()}
    modules = {Q: plain.get_submodule(Q), DOWN: plain.get_submodule(DOWN)}
    weight, changes = 0.0, {}
    for module, change in read_adapter(adapter).modules.items():
        delta = change.direction
        changes[module] = delta.scale * (delta.b.load(np.float64) @ delta.a.load(np.float64))
        weight = 0.3 * np.abs(old[f"{module}.weight"]).mean() / np.abs(changes[module]).mean()
    result = fuse(
        base, {adapter: weight}, requantize=True, allow_lossy=True, output=tmp_path / "fused"
    )
    fused = loaded(tmp_path / "fused")
    along = squared = off = size = 0.0
    for key, value in fused.state_dict().items():
        module = key.removesuffix(".weight")
        moved = value.double().numpy() - old[key]
        if module not in changes:
            assert not moved.any(), key
            continue
        change = weight * changes[module]
        along, squared = along + np.vdot(moved, change), squared + np.vdot(change, change)
        off += np.square(moved - change).sum()
        size += np.square(value.double().numpy()).sum()
    assert result.surviving == pytest.approx(along / squared, rel=1e-3)
    error = np.sqrt(off / squared)
    # Products of FP8 are float32 in the report; the library rounds them to BF16.
    is_float32 = result.tensors[0].dtype.startswith("FP8")
    rounding = 2.0**-18 * size / squared / (2 * error) if is_float32 else 0.0
    assert abs(result.quantising_error - error) <= max(1e-3 * error, rounding)
    before, after = (raw(folder) for folder in (base, tmp_path / "fused"))
    assert {k.rpartition(".")[0] for k in before if before[k] != after[k]} == set(changes)
    got = logits(fused)
    start = logits(plain)
    with torch.no_grad():
        for module, layer in modules.items():
            layer.weight += torch.from_numpy(weight * changes[module]).float()
    want = logits(plain)
    apart = np.linalg.norm(got - want) / np.linalg.norm(want - start)
    assert apart < 2 * result.quantising_error


def raw(folder):
    return {k: bytes(t.raw()) for k, t in read_checkpoint(folder).tensors.items()}
