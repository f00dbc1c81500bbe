"""Quantised layers of transformers' Conv1D, whose weight is (in, out) where the codes are not."""

import json

import numpy as np
import pytest
from encoder_cases import AUTO_ROUND, CASES
from quantised_cases import pairs
from test_written_back import save

import loratools as lt
from loratools_formats.checkpoints.checkpoint import read_checkpoint


@pytest.mark.parametrize("name", ["GPTQ 4", "AWQ gemm", "MXFP4 packed 2-D", "MXFP8 of AutoRound"])
def test_conv1d_layers_are_coded_as_linear_ones(name, tmp_path):
    """Tools transpose GPT-2's layers before they pack them: the model holds the transpose.

    GPT-2 has square ones, of which no shape tells.
    """
    rng = np.random.default_rng(0)
    if name.startswith("MXFP4"):
        codes, scales = rng.integers(0, 16, (64, 128)), rng.integers(115, 125, (64, 4))
        tensors = {"x.weight_packed": pairs(codes), "x.weight_scale": scales.astype(np.uint8)}
        told = {"stated": {"quant_method": "compressed-tensors"}}
    elif name.startswith("MXFP8"):
        tensors, _ = CASES["MXFP8"](rng)
        told = {"stated": {**AUTO_ROUND, "packing_format": "auto_round:llm_compressor"}}
    else:
        tensors, told = CASES[name](rng)
    stated = told["stated"]
    module = "transformer.h.0.mlp.c_proj"
    named = {key.replace("x.", f"{module}.", 1): value for key, value in tensors.items()}
    values = {}
    for kind in ("gpt2", "llama"):
        config = {"model_type": kind, "quantization_config": stated}
        base = save(tmp_path / kind, named, config)
        lt.dequantize(base, dtype="f32", output=tmp_path / f"{kind}-plain")
        plain = read_checkpoint(tmp_path / f"{kind}-plain").tensors[f"{module}.weight"]
        values[kind] = plain.load(np.float64)
    assert values["llama"].shape == (64, 128)
    np.testing.assert_array_equal(values["gpt2"], values["llama"].T)
    factors = {
        f"base_model.model.{module}.lora_A.weight": rng.standard_normal((4, 128)).astype("f4"),
        f"base_model.model.{module}.lora_B.weight": rng.standard_normal((64, 4)).astype("f4"),
    }
    changes = {}
    for kind in ("gpt2", "llama"):
        transposed = kind == "gpt2"
        folder = save(tmp_path / f"{kind}-adapter", factors, {})
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()
        about = {
            "peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["c_proj"],
            "fan_in_fan_out": transposed,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(about))
        size = 0.5 * np.abs(values[kind]).mean()
        result = lt.fuse(
            tmp_path / kind, {folder: size}, requantize=True, allow_lossy=True,
            output=tmp_path / f"{kind}-fused",
        )  # fmt: skip
        after = tmp_path / f"{kind}-fused-plain"
        lt.dequantize(tmp_path / f"{kind}-fused", dtype="f32", output=after)
        moved = read_checkpoint(after).tensors[f"{module}.weight"].load(np.float64)
        changes[kind] = moved - values[kind]
        change = size * lt.delta(lt.read(folder), module)
        change = change if change.shape == moved.shape else change.T
        share = np.vdot(changes[kind], change) / np.vdot(change, change)
        assert result.surviving == pytest.approx(share, rel=1e-3)
        assert share > 0.3
    np.testing.assert_array_equal(changes["gpt2"], changes["llama"].T)


def test_eight_bit_floats_have_the_shape_of_the_plain_weight(tmp_path):
    tensors, told = CASES["FP8 a row"](np.random.default_rng(0))
    module = "transformer.h.0.mlp.c_fc"
    named = {key.replace("x.", f"{module}.", 1): value for key, value in tensors.items()}
    config = {"model_type": "gpt2", "quantization_config": told["quantization_config"]}
    lt.dequantize(save(tmp_path / "base", named, config), dtype="f32", output=tmp_path / "plain")
    plain = read_checkpoint(tmp_path / "plain").tensors[f"{module}.weight"]
    codes, scales = tensors["x.weight"][0].astype("f4"), tensors["x.weight_scale"]
    np.testing.assert_array_equal(plain.load(np.float32), codes * scales)
