"""Fusing into bases that transformers quantised, beside PEFT and bitsandbytes on them."""

import json

import numpy as np
import pytest
from four_bit_models import MODELS, build, logits, quantized_by_transformers, tensors_of

from loratools.base.dequantised import dequantised
from loratools.base.fourbit import scales
from loratools.base.fourbit.encode import FourBitOptions
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import OptionError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}
KINDS = [("llama", "nf4", True), ("llama", "fp4", False), ("gpt2", "nf4", True)]


@pytest.fixture(autouse=True)
def _torch_mean(monkeypatch):
    """Take the mean of scales as torch does, whose last bit depends on how it adds them up."""
    import torch

    monkeypatch.setattr(scales, "mean", lambda a: torch.from_numpy(a).mean().numpy()[()])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function giving a quantised base that transformers saved, and an adapter for it."""
    root = tmp_path_factory.mktemp("four-bit")

    def make(name, quant_type, double, dora=False):
        import peft
        import torch

        options = FourBitOptions(quant_type, double_quant=double)
        plain_base = root / name
        base = root / f"{name}-{quant_type}-{double}"
        if not plain_base.exists():
            build(name).save_pretrained(plain_base)
        if not base.exists():
            quantized_by_transformers(name, plain_base, options).save_pretrained(base)
        adapter = root / f"{name}-dora-{dora}"
        if not adapter.exists():
            config = peft.LoraConfig(
                r=4, lora_alpha=8, target_modules=TARGETS[name], use_dora=dora,
                fan_in_fan_out=name == "gpt2",
            )  # fmt: skip
            model = peft.get_peft_model(MODELS[name].load(plain_base), config)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_B" in key:
                        parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
            model.save_pretrained(adapter)
        return base, adapter

    return make


def fused(base, adapter, output, weight=1.0, **options):
    inputs = [FuseInput(read_adapter(adapter), weight, "adapter")]
    return Fusion(read_checkpoint(base), inputs, FuseOptions(**options)).write(output)


def deltas(adapter, weight=1.0):
    """Return ΔW as (out, in) in float64 by module."""
    return {
        module: weight * d.scale * (d.b.load(np.float64) @ d.a.load(np.float64))
        for module, change in read_adapter(adapter).modules.items()
        for d in (change.direction,)
    }


@pytest.mark.parametrize(("name", "quant_type", "double"), KINDS)
def test_sums_are_those_of_what_bitsandbytes_reads(made, tmp_path, name, quant_type, double):
    base, adapter = made(name, quant_type, double)
    result = fused(base, adapter, tmp_path / "out")
    model = MODELS[name].load(base)
    written = MODELS[name].load(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    changes = {f"{module}.weight": delta for module, delta in deltas(adapter).items()}
    compared = 0
    for key, parameter in written.named_parameters():
        if not key.endswith(".weight"):
            continue
        values = dequantised_by_bitsandbytes(model, key.removesuffix(".weight"))
        if values is None:
            continue
        compared += 1
        turned = name == "gpt2"
        exact = values.astype(np.float64)
        if key in changes:
            exact = exact + changes[key]
        found = parameter.detach().float().numpy()
        found = found.T if turned else found
        assert mismatches(found, exact) <= 1e-4 * exact.size, key
    assert compared == sum(
        w.is_four_bit_format for w in dequantised(read_checkpoint(base)).weights.values()
    )
    assert {r.key for r in result.tensors} == set(changes)


def dequantised_by_bitsandbytes(model, module):
    """Return a weight as bitsandbytes dequantises it; by its torch code where that is wrong."""
    import bitsandbytes.functional

    weight = model.get_submodule(module).weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        return None
    assert state.shape[1] % state.blocksize == 0 or state.shape[1] % 16
    return bitsandbytes.functional.dequantize_4bit(weight.data, state).float().numpy()


def mismatches(found, exact):
    """Count elements unlike the exact ones rounded to bfloat16; all must be neighbours."""
    import torch

    want = torch.from_numpy(np.array(exact)).to(torch.bfloat16).float().numpy()
    assert (np.abs(found - want) <= 2.0**-7 * np.abs(want) + 1e-30).all()
    return int((found != want).sum())


@pytest.mark.parametrize("dora", [False, True])
def test_logits_are_those_of_the_adapter_live_on_the_quantised_model(made, tmp_path, dora):
    """In float32 throughout, so that nothing but the order of sums differs."""
    import peft
    import torch

    base, adapter = made("llama", "nf4", True, dora)
    fused(base, adapter, tmp_path / "out", dtype="f32")
    model = MODELS["llama"].load(tmp_path / "out")
    # The quantised weights, as every loader reads them, in a float32 model.
    tensors = dequantised(read_checkpoint(base)).checkpoint.tensors
    live = MODELS["llama"].load(base.parent / "llama").float()
    live.load_state_dict({k: torch.from_numpy(t.load(np.float32)) for k, t in tensors.items()})
    live = peft.PeftModel.from_pretrained(live, adapter)
    want = logits("llama", live)
    assert np.abs(logits("llama", model) - want).max() < 1e-5 * np.abs(want).max()
    assert np.abs(logits("llama", MODELS["llama"].load(base)) - want).max() > 1e-2


@pytest.mark.parametrize(("name", "quant_type", "double"), KINDS)
def test_quantised_again_as_bitsandbytes_does(made, tmp_path, name, quant_type, double):
    import bitsandbytes.functional
    import torch

    base, adapter = made(name, quant_type, double)
    result = fused(base, adapter, tmp_path / "out", requantize=True)
    model = MODELS[name].load(base)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    changes = {f"{module}.weight": delta for module, delta in deltas(adapter).items()}
    for report in result.tensors:
        old = dequantised_by_bitsandbytes(model, report.key.removesuffix(".weight"))
        total = (old.astype(np.float64) + changes[report.key]).astype(np.float32)
        packed, state = bitsandbytes.functional.quantize_4bit(
            torch.from_numpy(total), quant_type=quant_type, compress_statistics=double
        )
        assert after[report.key].tobytes() == packed.numpy().tobytes()
        assert after[f"{report.key}.absmax"].tobytes() == state.absmax.numpy().tobytes()
        state.dtype = torch.bfloat16
        new = bitsandbytes.functional.dequantize_4bit(packed, state).float().numpy()
        change = changes[report.key]
        share = np.sum((new - old) * change) / np.sum(change**2)
        assert report.surviving == pytest.approx(share, rel=1e-6)
        off = np.linalg.norm(new - old - change) / np.linalg.norm(change)
        assert report.lost == pytest.approx(off, rel=1e-6)
    touched = {report.key for report in result.tensors}
    for key in before:
        if not any(key.startswith(name) for name in touched):
            assert before[key].tobytes() == after[key].tobytes()
    loaded, info = MODELS[name].load(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert np.isfinite(logits(name, loaded)).all()


def test_an_erased_change_is_refused_unless_allowed(made, tmp_path):
    base, adapter = made("llama", "nf4", True)
    with pytest.raises(UnsupportedError, match="survives"):
        fused(base, adapter, tmp_path / "out", 0.001, requantize=True)
    assert not (tmp_path / "out").exists()
    result = fused(base, adapter, tmp_path / "out", 0.001, requantize=True, allow_lossy=True)
    assert result.surviving < 0.5


def test_modes(made, tmp_path):
    base, adapter = made("llama", "nf4", True)
    with pytest.raises(OptionError, match="16-bit base"):
        fused(base, adapter, tmp_path / "out", base_mode="original")
    with pytest.raises(OptionError, match="the base is not quantised"):
        fused(base.parent / "llama", adapter, tmp_path / "out", base_mode="dequant")
    with pytest.raises(OptionError, match="quantised again"):
        fused(base.parent / "llama", adapter, tmp_path / "out", requantize=True)
    inputs = [FuseInput(read_adapter(adapter), 1.0, "a")]
    again = Fusion(read_checkpoint(base), inputs, FuseOptions(requantize=True)).preview
    assert set(again.dtypes.values()) == {"NF4"}
    fused(base, adapter, tmp_path / "one", base_mode="dequant")
    fused(base, adapter, tmp_path / "two")
    names = ("model.safetensors", "config.json", "provenance.json")
    assert all(
        (tmp_path / "one" / n).read_bytes() == (tmp_path / "two" / n).read_bytes() for n in names
    )
    record = json.loads((tmp_path / "one" / "provenance.json").read_text())["predicate"]
    assert record["options"]["base_mode"] == "dequant"
