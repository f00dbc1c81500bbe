"""Checkpoints we quantise, loaded by transformers and bitsandbytes, beside their own."""

import numpy as np
import pytest
from four_bit_models import MODELS, build, logits, quantized_by_transformers, tensors_of

from loratools.base.fourbit import scales
from loratools.base.fourbit.encode import FourBitOptions
from loratools.operations.dequantize import dequantize
from loratools.operations.quantize import QuantizeOptions, quantize
from loratools_formats.checkpoints.checkpoint import read_checkpoint


@pytest.fixture(autouse=True)
def _torch_mean(monkeypatch):
    """Take the mean of scales as torch does, whose last bit depends on how it adds them up."""
    import torch

    monkeypatch.setattr(scales, "mean", lambda a: torch.from_numpy(a).mean().numpy()[()])


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Return a function from a model's name to the checkpoint that transformers saved."""
    root = tmp_path_factory.mktemp("four-bit-bases")

    def base(name):
        if not (root / name).exists():
            build(name).save_pretrained(root / name)
        return root / name

    return base


@pytest.mark.parametrize(
    ("name", "quant_type", "double"),
    [(name, "nf4", True) for name in MODELS]
    + [("llama", "fp4", False), ("llama", "nf4", False), ("gpt2", "fp4", True)],
)
def test_loaded_like_a_model_quantised_by_transformers(bases, tmp_path, name, quant_type, double):
    options = QuantizeOptions(FourBitOptions(quant_type, double_quant=double))
    base = bases(name)
    quantize(read_checkpoint(base), tmp_path / "ours", options)
    theirs = quantized_by_transformers(name, base, options.four_bit)
    theirs.save_pretrained(tmp_path / "theirs")
    saved, made = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert set(made) == set(saved)
    for key, tensor in saved.items():
        assert made[key].dtype == tensor.dtype, key
        assert made[key].shape == tensor.shape, key
        assert made[key].tobytes() == tensor.tobytes(), key
    ours, info = MODELS[name].load(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    if name != "qwen_moe":  # bitsandbytes 0.50 cannot run its gate of one output on a CPU
        assert np.array_equal(logits(name, ours), logits(name, theirs))


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
def test_blocksizes_that_transformers_does_not_choose_itself_load(bases, tmp_path, blocksize):
    options = QuantizeOptions(FourBitOptions("nf4", blocksize))
    quantize(read_checkpoint(bases("llama")), tmp_path / "ours", options)
    model = MODELS["llama"].load(tmp_path / "ours")
    dequantize(read_checkpoint(tmp_path / "ours"), tmp_path / "plain", "bf16")
    plain = MODELS["llama"].load(tmp_path / "plain")
    for name, module in model.named_modules():
        state = getattr(module.weight, "quant_state", None) if hasattr(module, "weight") else None
        if state is not None:
            assert state.blocksize == blocksize
            if state.shape[1] % blocksize and blocksize < 2048:
                continue  # bitsandbytes 0.50 takes the wrong scales there on a CPU
            values = functional().dequantize_4bit(module.weight.data, state)
            assert values.equal(plain.get_submodule(name).weight)


def functional():
    import bitsandbytes.functional

    return bitsandbytes.functional


def test_what_is_skipped_stays_and_loads(bases, tmp_path):
    base = bases("llama")
    options = QuantizeOptions(skip=(r"layers\.1\.mlp", "k_proj"))
    result = quantize(read_checkpoint(base), tmp_path / "ours", options)
    reasons = {kept.name: kept.reason for kept in result.kept}
    assert reasons.pop("lm_head") == "output embedding"
    assert reasons.pop("model.embed_tokens") == "embedding"
    assert len(reasons) == 5
    assert set(reasons.values()) == {"skipped as asked"}
    model, info = MODELS["llama"].load(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    exact = MODELS["llama"].load(base)
    plain = model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert plain.equal(exact.get_submodule("model.layers.1.mlp.up_proj").weight)
    difference = logits("llama", model) - logits("llama", exact)
    assert 0 < np.linalg.norm(difference) < 0.5 * np.linalg.norm(logits("llama", exact))


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied"])
def test_a_checkpoint_saved_by_transformers_is_dequantised(bases, tmp_path, name):
    """Against bitsandbytes' own values, where every row ends with a block."""
    theirs = quantized_by_transformers(name, bases(name), FourBitOptions())
    theirs.save_pretrained(tmp_path / "theirs")
    result = dequantize(read_checkpoint(tmp_path / "theirs"), tmp_path / "plain", "bf16")
    plain = MODELS[name].load(tmp_path / "plain")
    assert "quantization_config" not in plain.config.to_dict()
    for report in result.tensors:
        module = theirs.get_submodule(report.name.removesuffix(".weight"))
        want = functional().dequantize_4bit(module.weight.data, module.weight.quant_state)
        found = plain.get_parameter(report.name).data
        assert found.equal(want.T if name == "gpt2" else want), report.name
    assert 0 < result.relative_error < 2**-8
    shapes = {n: tuple(p.shape) for n, p in MODELS[name].load(bases(name)).named_parameters()}
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()} == shapes


def test_quantising_again_what_was_dequantised_keeps_every_code(bases, tmp_path):
    base = bases("gpt2")
    options = QuantizeOptions(FourBitOptions(double_quant=False))
    quantize(read_checkpoint(base), tmp_path / "once", options)
    dequantize(read_checkpoint(tmp_path / "once"), tmp_path / "plain", "f32")
    again = quantize(read_checkpoint(tmp_path / "plain"), tmp_path / "twice", options)
    once, twice = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    assert {k for k in once if "quant_state" not in k and (once[k] != twice[k]).any()} == set()
    assert again.relative_error < 1e-7
