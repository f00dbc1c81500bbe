"""Commands on whole quantised bases: what they tell, drop, keep and refuse."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from quantised_cases import pairs, to_words
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools.cli import cli
from loratools_formats.disk.errors import UnsupportedError

RNG = np.random.default_rng(1)
KEY = "layers.0.q"
F16 = np.float16


def gptq(module, out=64, width=64):
    codes = RNG.integers(0, 16, (out, width))
    return {
        f"{module}.qweight": np.ascontiguousarray(to_words(codes, 4).T),
        f"{module}.qzeros": to_words(np.full((1, out), 7), 4),
        f"{module}.scales": np.full((1, out), 0.01, F16),
        f"{module}.g_idx": np.zeros(width, np.int32),
    }, (codes - 8).astype(F16) * F16(0.01)


@pytest.fixture
def base(tmp_path):
    """Return a function that writes a folder, with files beside its configuration."""

    def made(tensors, quantization=None, files=None):
        folder = tmp_path / "base"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        if quantization is not None:
            config["quantization_config"] = quantization
        (folder / "config.json").write_text(json.dumps(config))
        for name, content in (files or {}).items():
            (folder / name).write_text(json.dumps(content))
        return folder

    return made


def test_fused_and_dequantised_gptq(base, make_folder, tmp_path):
    """A bias stays; scales, zeros and files on quantisation go; the change is added once."""
    tensors, values = gptq(KEY)
    extra = {f"{KEY}.bias": np.ones(64, F16), "norm.weight": np.ones(64, F16)}
    folder = base(
        tensors | extra, {"quant_method": "gptq", "bits": 4}, {"quantize_config.json": {"bits": 4}}
    )
    lt.dequantize(folder, dtype="f16", output=tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert set(plain) == {f"{KEY}.weight", *extra}
    assert plain[f"{KEY}.weight"].tobytes() == values.tobytes()
    assert not (tmp_path / "plain" / "quantize_config.json").exists()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    adapter = make_folder(modules={KEY: (64, 64, 8)}, dtype="f32")
    result = lt.fuse(folder, adapter, output=tmp_path / "fused")
    assert any("16 bits now" in note for note in result.notes)
    change = lt.delta(lt.read(adapter), KEY)
    got = load_file(tmp_path / "fused" / "model.safetensors")[f"{KEY}.weight"]
    assert got.dtype == F16
    wanted = values.astype(np.float64) + change
    assert (np.abs(got - wanted) <= 2.0**-11 * np.abs(wanted) + 2.0**-25).all()
    assert lt.verify(tmp_path / "fused", base=folder, adapters=adapter).contained


def test_awq_is_told_to_fit_no_adapter_of_the_original(base, make_folder, tmp_path):
    tensors = {
        f"{KEY}.qweight": np.zeros((64, 8), np.int32),
        f"{KEY}.qzeros": np.zeros((2, 8), np.int32),
        f"{KEY}.scales": np.ones((2, 64), F16),
    }
    folder = base(tensors, {"quant_method": "awq", "bits": 4, "version": "gemm"})
    adapter = make_folder(modules={KEY: (64, 64, 8)}, dtype="f32")
    result = lt.fuse(folder, adapter, output=tmp_path / "fused")
    (warning,) = (each for each in result.findings if each.code == "rescaled-inputs")
    assert "trained on the original model" in warning.message


def test_a_version_in_another_file(base, tmp_path):
    """Where config.json says nothing, quantize_config.json does: zeros of gptq_v2 are as stored."""
    tensors, values = gptq(KEY)
    folder = base(tensors, None, {"quantize_config.json": {"checkpoint_format": "gptq_v2"}})
    lt.dequantize(folder, dtype="f32", output=tmp_path / "plain")
    got = load_file(tmp_path / "plain" / "model.safetensors")[f"{KEY}.weight"]
    codes = (values / F16(0.01)).round().astype(int) + 8
    np.testing.assert_array_equal(got, ((codes - 7).astype(F16) * F16(0.01)).astype(np.float32))


def test_what_info_tells_of_a_base(base):
    tensors, _ = gptq(f"model.{KEY}")
    more, _ = gptq("model.layers.1.q")
    plain = {"lm_head.weight": np.ones((8, 64), F16), "model.norm.weight": np.ones(64, F16)}
    folder = base(tensors | more | plain, {"quant_method": "gptq", "bits": 4})
    found = lt.info_base(folder)
    (quantised,) = found.quantised
    assert (quantised.format, quantised.bits, quantised.group) == ("GPTQ", 4, 64)
    assert (quantised.weights, quantised.parameters) == (2, 2 * 64 * 64)
    assert (found.quant_method, found.left_out, found.problem) == ("gptq", ("lm_head",), None)
    assert found.parameters == 2 * 64 * 64 + 8 * 64 + 64
    text = CliRunner().invoke(cli, ["info", str(folder)]).stdout
    assert "GPTQ, 4 bits, groups of 64: 2 weights" in text
    assert "left out    lm_head" in text
    printed = json.loads(CliRunner().invoke(cli, ["info", str(folder), "--json"]).stdout)
    assert printed == {**found.to_dict(), "seconds": printed["seconds"]}


OTHERS = {
    "HQQ": {f"{KEY}.W_q": np.zeros((8, 64), np.uint8), f"{KEY}.scale": np.ones((8, 1), F16)},
    "EXL3": {f"{KEY}.trellis": np.zeros((4, 4, 64), np.int16), f"{KEY}.suh": np.ones(64, F16)},
    "torchao": {f"{KEY}._weight_qdata": np.zeros((8, 64), np.int8)},
    "AQLM": {
        f"{KEY}.codebooks": np.ones((1, 256, 1, 8), F16),
        f"{KEY}.codes": np.ones((8, 8, 1), np.int8),
    },
    "ModelOpt, with scales of inputs": {  # W4A8_AWQ
        f"{KEY}.weight": np.zeros((4, 64), np.uint8),
        f"{KEY}.weight_scale_2": np.ones((), np.float32),
        f"{KEY}.weight_scale": np.ones((8, 1), np.float32),
        f"{KEY}.pre_quant_scale": np.ones(64, F16),
    },
    "LLM.int8 of bitsandbytes": {  # codes of another type
        f"{KEY}.weight": np.zeros((8, 64), np.uint8), f"{KEY}.SCB": np.ones(8, np.float32),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_refused_by_name(base, tmp_path, name):
    methods = {"AQLM": {"quant_method": "aqlm"}}
    folder = base(OTHERS[name] | {"norm.weight": np.ones(64, F16)}, methods.get(name))
    with pytest.raises(UnsupportedError, match=rf"cannot be read.*{name}"):
        lt.dequantize(folder, output=tmp_path / "plain")
    found = lt.info_base(folder)
    assert found.parameters is None
    assert name in found.problem
    assert not (tmp_path / "plain").exists()


def test_a_weight_that_is_there_twice(base, tmp_path):
    tensors, values = gptq(KEY)
    folder = base(tensors | {f"{KEY}.weight": values})
    with pytest.raises(lt.LoratoolsError, match=r"twice.*layers.0.q.weight"):
        lt.dequantize(folder, output=tmp_path / "plain")


def test_scales_of_running_are_dropped(base, tmp_path):
    """Scales of inputs, which compressed-tensors stores for NVFP4, mean nothing for weights."""
    tensors = {
        f"{KEY}.weight_packed": pairs(np.full((8, 64), 2)),
        f"{KEY}.weight_scale": np.full((8, 4), 0x38, np.uint8),  # 1 in E4M3
        f"{KEY}.weight_global_scale": np.full(1, 2, np.float32),
        f"{KEY}.input_global_scale": np.ones(1, np.float32),
    }
    folder = base(tensors, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
    file = folder / "model.safetensors"
    data = file.read_bytes()
    at = data.index(b'"layers.0.q.weight_scale"')
    head = data[at:].replace(b'"dtype":"U8"', b'"dtype":"F8_E4M3"', 1)
    size = int.from_bytes(data[:8], "little") + len(b"F8_E4M3") - len(b"U8")
    file.write_bytes(size.to_bytes(8, "little") + data[8:at] + head)
    lt.dequantize(folder, dtype="f32", output=tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert set(plain) == {f"{KEY}.weight"}
    np.testing.assert_array_equal(plain[f"{KEY}.weight"], np.full((8, 64), 0.5))


def test_extract_takes_quantised_bases_as_either_side(base, make_folder, tmp_path):
    """Between a quantised base and what was fused of it lies the adapter, and its negative."""
    tensors, _ = gptq(KEY)
    folder = base(tensors, {"quant_method": "gptq", "bits": 4})
    adapter = make_folder(modules={KEY: (64, 64, 8)}, dtype="f32")
    lt.fuse(folder, adapter, dtype="f32", output=tmp_path / "fused")
    result = lt.extract(base=folder, tuned=tmp_path / "fused", rank=8)
    change = lt.delta(lt.read(adapter), KEY)
    np.testing.assert_allclose(
        lt.delta(result.adapter, *result.adapter.modules), change, atol=1e-5 * np.abs(change).max()
    )
    back = lt.extract(base=tmp_path / "fused", tuned=folder, rank=8)
    np.testing.assert_allclose(
        lt.delta(back.adapter, *back.adapter.modules), -change, atol=1e-5 * np.abs(change).max()
    )
