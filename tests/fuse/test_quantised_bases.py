"""Quantised bases: what a scale or a rotation means, and what no adapter changes stays as it is."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from loratools.base.dequantised import dequantised
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import UnsupportedError

KEY = "layers.0.q.weight"


@pytest.fixture
def make(tmp_path):
    """Return a function that writes a checkpoint folder."""

    def made(tensors, quantization, *, nested=False):
        folder = tmp_path / "base"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {} if quantization is None else {"quantization_config": quantization}
        config = {"text_config": config} if nested else config
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        return read_checkpoint(folder)

    return made


def fused(base, folder, output, **options):
    adapter = read_adapter(folder)
    Fusion(base, [FuseInput(adapter, 1.0, "a")], FuseOptions(**options)).write(output)
    delta = adapter.modules["layers.0.q"].direction
    change = delta.scale * (delta.b.load(np.float64) @ delta.a.load(np.float64))
    return load_file(output / "model.safetensors"), change


def codes(*shape):
    import torch

    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 20).to(torch.float8_e4m3fn)


def grid_of(shape, block):
    import torch

    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(
        -4, 4, (shape[0] // block[0], shape[1] // block[1]), generator=generator
    )
    return torch.exp2(exponents.float())


def torch_type(name):
    import torch

    return getattr(torch, name)


CASES = {
    "DeepSeek-V4": ("layers.0.q.scale", lambda s: s, {"quant_method": "fp8"}, False),
    "Mistral Large": ("layers.0.q.qscale_weight", lambda s: s, {"quant_method": "fp8"}, False),
    "E8M0": (f"{KEY}_scale_inv", lambda s: s.to(torch_type("float8_e8m0fnu")),
             {"quant_method": "fp8", "scale_fmt": "ue8m0"}, False),
    "MXFP8": (f"{KEY}_scale_inv", lambda s: (s.log2() + 127).to(torch_type("uint8")),
              {"quant_method": "mxfp8", "weight_block_size": [4, 5]}, False),
    "compressed-tensors": (f"{KEY}_scale", lambda s: s, {
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"block_structure": [4, 5]}}}}, False),
    "in the text section": (f"{KEY}_scale_inv", lambda s: s,
                            {"quant_method": "fp8", "weight_block_size": [4, 5]}, True),
    "another block than stated": (f"{KEY}_scale_inv", lambda s: s,
                                  {"quant_method": "fp8", "weight_block_size": [128, 128]}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scales_of_eight_bit_floats(case, make):
    name, stored, quantization, nested = CASES[case]
    w, scale = codes(24, 20), grid_of((24, 20), (4, 5))
    base = make({KEY: w, name: stored(scale).contiguous()}, quantization, nested=nested)
    spread = scale.numpy().repeat(4, 0).repeat(5, 1)
    found = dequantised(base).checkpoint
    assert set(found.tensors) == {KEY}
    np.testing.assert_array_equal(found.tensors[KEY].load(), w.float().numpy() * spread)
    assert "quantization_config" not in json.dumps(dict(found.config))


@pytest.mark.parametrize("blocks", [False, True])
def test_a_scale_of_inputs_multiplies_columns(make, make_folder, tmp_path, blocks):
    """W_eff[:, j] = dq(W)[:, j] · s[j] (ModelOpt's AWQ), and the scale is not written again."""
    import torch

    w = codes(24, 20)
    scale = grid_of((24, 20), (4, 5)) if blocks else torch.tensor(0.25)
    s = torch.rand(20) + 0.5
    tensors = {KEY: w, f"{KEY}_scale": scale, "layers.0.q.pre_quant_scale": s}
    base = make(tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    spread = scale.numpy().repeat(4, 0).repeat(5, 1) if blocks else 0.25
    effective = w.float().numpy() * spread * s.numpy()
    written, change = fused(base, make_folder(dtype="f32"), tmp_path / "out", dtype="f32")
    assert set(written) == {KEY}
    np.testing.assert_allclose(written[KEY].numpy(), effective + change, rtol=1e-6, atol=1e-6)


ROTATED = {"config_groups": {"R4": {"type": "hadamard", "apply": []}}}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16"])
def test_a_rotated_base_is_refused(make, make_folder, dtype, nested):
    import torch

    tensors = {KEY: codes(24, 20).to(getattr(torch, dtype))}
    if dtype != "bfloat16":
        tensors[f"{KEY}_scale"] = torch.tensor(0.5)
    base = make(
        tensors,
        {"quant_method": "compressed-tensors", "format": "float-quantized",
         "transform_config": ROTATED},
        nested=nested,
    )  # fmt: skip
    inputs = [FuseInput(read_adapter(make_folder(dtype="f32")), 1.0, "a")]
    with pytest.raises(UnsupportedError, match="rotated"):
        Fusion(base, inputs, FuseOptions())


def test_an_empty_transform_is_none(make, make_folder, tmp_path):
    import torch

    tensors = {KEY: codes(24, 20), f"{KEY}_scale": torch.tensor(0.5)}
    base = make(tensors, {"quant_method": "compressed-tensors", "transform_config": {}})
    written, change = fused(base, make_folder(dtype="f32"), tmp_path / "out", dtype="f32")
    effective = tensors[KEY].float().numpy() * 0.5
    np.testing.assert_allclose(written[KEY].numpy(), effective + change, rtol=1e-6, atol=1e-6)


def mxfp4():
    import torch

    name = "layers.0.mlp.experts.gate_up_proj"
    return {
        f"{name}_blocks": torch.randint(0, 256, (4, 192, 2, 16), dtype=torch.uint8),
        f"{name}_scales": torch.randint(110, 130, (4, 192, 2), dtype=torch.uint8),
        f"{name}_bias": torch.zeros(4, 192).bfloat16(),
    }


def beside_packed():
    import torch

    return {
        "layers.0.mlp.experts.0.w1.weight": torch.randint(-9, 9, (8, 8), dtype=torch.int8),
        "layers.0.mlp.experts.0.w1.scale": torch.ones(8, 1).to(torch.float8_e8m0fnu),
        "layers.0.o.weight": codes(8, 8),
        "layers.0.o.scale": torch.ones(1, 1),
    }


def eight_bit():
    import torch

    return {"layers.0.o.weight": codes(8, 8), "layers.0.o.weight_scale_inv": torch.ones(1, 1)}


UNTOUCHED = {
    "gpt-oss": (mxfp4, {"quant_method": "mxfp4"}),
    "DeepSeek-V4": (beside_packed, {"quant_method": "fp8", "expert_dtype": "fp4"}),
    "FP8": (eight_bit, {"quant_method": "fp8"}),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_no_adapter_changes_is_copied(case, make, make_folder, tmp_path):
    """Every other tensor and the configuration keep every byte."""
    import torch

    tensors, quantization = UNTOUCHED[case]
    w = torch.randn(24, 20)
    stored = {**tensors(), KEY: w}
    base = make(stored, quantization)
    written, change = fused(base, make_folder(dtype="f32"), tmp_path / "out")
    assert set(written) == set(stored)
    for key, tensor in stored.items():
        if key != KEY:
            assert written[key].dtype == tensor.dtype
            assert torch.equal(written[key].view(torch.uint8), tensor.view(torch.uint8)), key
    np.testing.assert_allclose(written[KEY].numpy(), w.numpy() + change, rtol=1e-6, atol=1e-6)
    config = (tmp_path / "out" / "config.json").read_bytes()
    assert config == (base.path / "config.json").read_bytes()


def packed_q():
    import torch

    return {
        "layers.0.q.weight_packed": torch.zeros(24, 10, dtype=torch.int32),
        "layers.0.q.weight_scale": torch.ones(24, 1),
    }


def scaled_q():
    import torch

    return {KEY: torch.ones(24, 20), "layers.0.q.pre_quant_scale": torch.ones(20)}


CHANGED = {
    "packed": (packed_q, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "inputs scaled": (scaled_q, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "inputs scaled, nothing said": (scaled_q, None),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_weight_that_cannot_be_read_is_not_changed(case, make, make_folder):
    tensors, quantization = CHANGED[case]
    base = make(tensors(), quantization)
    inputs = [FuseInput(read_adapter(make_folder(dtype="f32")), 1.0, "a")]
    with pytest.raises(UnsupportedError, match="cannot be read"):
        Fusion(base, inputs, FuseOptions())
