"""Weights that torchao and HQQ quantised: their own values, and torchao's loader on our outputs."""

import json
import warnings

import numpy as np
import peft_oracle as oracle
import pytest

from loratools import delta, fuse
from loratools.base.codecs import Stored, coded_weights
from loratools.base.dequantised import dequantised
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

IGNORED = [*oracle.WARNINGS, "ignore::UserWarning", "ignore::DeprecationWarning"]
pytestmark = [pytest.mark.filterwarnings(line) for line in IGNORED]

Q = "model.layers.0.self_attn.q_proj"


def configs():
    import torch
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerGroup

    group = PerGroup(32)
    return {
        "int8": Int8WeightOnlyConfig(version=2),
        "float8": Float8WeightOnlyConfig(version=2),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group, version=2),
    }


def tiny_llama():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=128, intermediate_size=256, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, initializer_range=0.1, tie_word_embeddings=False,
        dtype="bfloat16", pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(params=["int8", "float8", "int4"])
def base(request, tmp_path):
    """Write a small Llama that transformers quantised by torchao, and return its own values."""
    pytest.importorskip("torchao")
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny_llama().save_pretrained(tmp_path / "plain")
    plan = TorchAoConfig(configs()[request.param])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=plan)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", values_of(model)


def values_of(model):
    return {
        key: (value.dequantize() if "." in type(value).__module__ and hasattr(value, "qdata")
              else value).double().numpy()
        for key, value in model.state_dict().items()
    }  # fmt: skip


def test_values_are_those_of_torchao(base):
    folder, want = base
    view = dequantised(read_checkpoint(folder))
    assert len(view.weights) == 7
    assert set(view.checkpoint.tensors) == set(want)
    for key, values in want.items():
        np.testing.assert_array_equal(view.checkpoint.tensors[key].load(np.float64), values)


def test_transformers_loads_what_keeps_the_format(base, make_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, old = base
    adapter = make_folder(modules={Q: (128, 128, 8)}, dtype="f32")
    (change,) = read_adapter(adapter).modules.values()
    delta = change.direction
    dense = delta.scale * (delta.b.load(np.float64) @ delta.a.load(np.float64))
    weight = 0.3 * np.abs(old[f"{Q}.weight"]).mean() / np.abs(dense).mean()
    result = fuse(
        folder, {adapter: weight}, requantize=True, allow_lossy=True, output=tmp_path / "fused"
    )
    new = values_of(AutoModelForCausalLM.from_pretrained(tmp_path / "fused"))
    moved = new.pop(f"{Q}.weight") - old.pop(f"{Q}.weight")
    for key, values in new.items():
        np.testing.assert_array_equal(values, old[key])
    change = weight * dense
    share = np.vdot(moved, change) / np.vdot(change, change)
    error = np.linalg.norm(moved - change) / np.linalg.norm(change)
    assert result.surviving == pytest.approx(share, rel=1e-3)
    assert result.quantising_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize(("bits", "axis"), [(4, 1), (3, 0), (8, 1)])
def test_transformers_loads_a_fused_base_of_hqq(bits, axis, make_folder, tmp_path):
    """In 16 bits it computes what hqq's own values plus ΔW do; hqq's format is not written."""
    pytest.importorskip("hqq")
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    model = tiny_llama()
    plan = BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    tensors = dict(model.state_dict())
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            coded = HQQLinear(
                layer, plan, compute_dtype=torch.bfloat16, device="cpu", del_orig=False
            )
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": value for part, value in coded.state_dict().items()}
            layer.weight.data.copy_(coded.dequantize())
    base = tmp_path / "base"
    model.config.save_pretrained(base)
    save_file(
        {k: v.clone() for k, v in tensors.items()}, base / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "hqq"}})
    )
    adapter = make_folder(modules={Q: (128, 128, 8)}, dtype="f32")
    change = delta(read_adapter(adapter), Q)
    weight = 0.3 * float(model.get_submodule(Q).weight.abs().mean()) / np.abs(change).mean()
    result = fuse(base, {adapter: weight}, output=tmp_path / "fused")
    with pytest.raises(UnsupportedError, match=rf"cannot be written again.*HQQ, {bits} bits"):
        fuse(base, adapter, requantize=True, output=tmp_path / "again")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32).eval()
    model = model.float().eval()
    ids = torch.tensor([[1, 7, 9, 30, 2]])
    with torch.no_grad():
        start = model(ids).logits.double()
        layer = model.get_submodule(Q)
        layer.weight.copy_((layer.weight.double() + weight * torch.from_numpy(change)).float())
        want, got = model(ids).logits.double(), fused(ids).logits.double()
    apart = float((got - want).norm() / (want - start).norm())
    assert apart < 2 * result.lost_to_rounding < 0.02


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_values_are_those_of_hqq(bits, axis):
    pytest.importorskip("hqq")
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        with torch.random.fork_rng():
            torch.manual_seed(0)
            linear = torch.nn.Linear(64, 48, bias=False)
        plan = BaseQuantizeConfig(nbits=bits, group_size=32, axis=axis)
        layer = HQQLinear(linear, plan, compute_dtype=torch.bfloat16, device="cpu")
    codes = {
        torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16",
    }  # fmt: skip
    tensors = {}
    for name, value in layer.state_dict().items():
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = DTYPES[codes[value.dtype]]
        tensors[f"x.{name}"] = TensorRef(
            f"x.{name}", dtype, tuple(value.shape), lambda data=data: data
        )
    (weight,) = coded_weights(Stored(tensors, {}, {})).values()
    assert {part.key for part in weight.parts} == set(tensors)
    want = layer.dequantize().float().numpy()
    np.testing.assert_array_equal(weight.tensor().load(np.float32), want)
