"""Fusing into quantised bases that stay quantised: what changes, what stays, what is reported."""

import json

import numpy as np
import pytest
from encoder_cases import CASES, mlx
from quantised_cases import only

import loratools as lt
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import OptionError, UnsupportedError

CHANGED, KEPT = "layers.0.q", "layers.1.q"
FORMATS = [
    name
    for name in CASES
    if name not in ("gpt-oss", "MXFP4 packed", "MXFP4 DeepSeek", "FP8 experts")
]
_CODES = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}


def save(folder, tensors, config, metadata=None):
    """Write a folder; NumPy's own types, those of ml_dtypes, or bytes with the name of a type."""
    folder.mkdir()
    header, blobs, at = {"__metadata__": {"format": "pt", **(metadata or {})}}, [], 0
    for key, value in tensors.items():
        values, code = value if isinstance(value, tuple) else (value, None)
        values = np.ascontiguousarray(values)
        if code is None:
            known = {d.numpy_dtype(): c for c, d in DTYPES.items() if c in _PLAIN}
            code = _CODES.get(values.dtype.name) or known[values.dtype]
        header[key] = {
            "dtype": code, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes],
        }  # fmt: skip
        blobs.append(values.tobytes())
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + b"".join(blobs)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_PLAIN = ("F32", "F16", "I8", "U8", "I32", "U32", "I64")


def base_of(name, folder):
    """Write a base of two weights of a case, one plain weight and a scale of running."""
    tensors, told = {}, {}
    for seed, module in enumerate((CHANGED, KEPT)):
        made, told = CASES[name](np.random.default_rng(seed))
        tensors |= {key.replace("x.", f"{module}.", 1): value for key, value in made.items()}
    tensors["norm.weight"] = np.ones(128, np.float16)
    tensors[f"{KEPT}.input_scale"] = np.array([3.0], np.float32)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {k: v for k, v in told.items() if k not in ("stated", "metadata")}
    if "stated" in told:
        config["quantization_config"] = told["stated"]
    about = {
        key.replace("x.", f"{module}."): text
        for key, text in told.get("metadata", {}).items()
        for module in (CHANGED, KEPT)
    }
    return save(folder, tensors, config, about), tensors, told


def values_of(folder, told, module=CHANGED):
    tensors = read_checkpoint(folder).tensors
    own = {
        f"x.{key.removeprefix(module)[1:]}": (
            np.frombuffer(t.raw(), np.uint8).view(t.dtype.numpy_dtype()).reshape(t.shape),
            t.dtype.code,
        )
        for key, t in tensors.items()
        if key.startswith(module) and not key.endswith("input_scale")
    }
    return only(own, **told).tensor().load(np.float64)


def raw(folder):
    return {k: bytes(t.raw()) for k, t in read_checkpoint(folder).tensors.items()}


@pytest.fixture
def adapter(make_folder):
    def made(width, size=1.0):
        folder = make_folder(modules={CHANGED: (64, width, 8)}, dtype="f32")
        change = lt.delta(lt.read(folder), CHANGED)
        return folder, size / np.abs(change).mean()

    return made


@pytest.mark.parametrize("name", FORMATS)
def test_a_fused_base_keeps_its_format(name, tmp_path, adapter):
    """Only codes and scales of the changed weight differ; both figures are those of the files."""
    base, _, told = base_of(name, tmp_path / "base")
    before = values_of(base, told)
    folder, weight = adapter(before.shape[1], 0.1 * np.abs(before).mean())
    result = lt.fuse(
        base, {folder: weight}, requantize=True, allow_lossy=True, output=tmp_path / "fused"
    )
    old, new = read_checkpoint(base), read_checkpoint(tmp_path / "fused")
    assert {k: (t.dtype, t.shape) for k, t in new.tensors.items()} == {
        k: (t.dtype, t.shape) for k, t in old.tensors.items()
    }
    different = {k for k, data in raw(base).items() if raw(tmp_path / "fused")[k] != data}
    leaves = {
        "weight",
        "_weight_qdata",
        "scales",
        "biases",
        "qweight",
        "weight_packed",
        "weight_scale",
    }
    codes = {"weight", "qweight", "weight_packed", "_weight_qdata"}
    assert {key.rpartition(".")[2] for key in different} & codes
    assert different <= {f"{CHANGED}.{leaf}" for leaf in leaves}
    assert (tmp_path / "fused" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    after = values_of(tmp_path / "fused", told)
    change = weight * lt.delta(lt.read(folder), CHANGED)
    share = np.vdot(after - before, change) / np.vdot(change, change)
    error = np.linalg.norm(after - before - change) / np.linalg.norm(change)
    (tensor,) = result.tensors
    assert tensor.surviving == pytest.approx(share, abs=1e-4)
    assert result.surviving == pytest.approx(tensor.surviving)
    assert tensor.lost_to_rounding == pytest.approx(error, rel=1e-4)
    assert result.quantising_error == tensor.lost_to_rounding
    assert result.copied == 2
    assert lt.verify(tmp_path / "fused", base=base, adapters={folder: weight}).contained is None


def test_a_change_that_four_bits_erase_is_refused(tmp_path, adapter):
    base, _, told = base_of("packed 4", tmp_path / "base")
    folder, weight = adapter(128, 0.01 * np.abs(values_of(base, told)).mean())
    with pytest.raises(UnsupportedError, match=r"erase most of the change.*% of ΔW survives"):
        lt.fuse(base, {folder: weight}, requantize=True, output=tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_noise_is_told_from_survival(tmp_path, adapter):
    """A tenth of a step survives in part by luck; its error is larger than ΔW."""
    base, _, told = base_of("INT8 (64, 4)", tmp_path / "base")
    folder, weight = adapter(128, 0.004 * np.abs(values_of(base, told)).mean())
    result = lt.fuse(
        base, {folder: weight}, requantize=True, allow_lossy=True, output=tmp_path / "fused"
    )
    told_so = any(each.code == "noisier-than-base" for each in result.findings)
    assert told_so == (result.quantising_error > 1)


def test_awq_warns_of_scaled_inputs_when_it_is_written(tmp_path, adapter):
    base, _, told = base_of("AWQ gemm", tmp_path / "base")
    folder, weight = adapter(128, np.abs(values_of(base, told)).mean())
    result = lt.fuse(base, {folder: weight}, requantize=True, output=tmp_path / "fused")
    assert [each.code for each in result.findings] == ["rescaled-inputs"]


def test_gptq_says_that_its_codes_cannot_be_chosen_by_data_again(tmp_path, adapter):
    base, _, told = base_of("GPTQ 4", tmp_path / "base")
    folder, weight = adapter(128, np.abs(values_of(base, told)).mean())
    result = lt.fuse(base, {folder: weight}, requantize=True, output=tmp_path / "fused")
    ((code, message),) = [(each.code, each.message) for each in result.findings]
    assert code == "nearest-codes"
    assert "cannot be repeated without data" in message
    assert not [
        each
        for each in lt.fuse(base, {folder: weight}, output=tmp_path / "plain").findings
        if each.code == "nearest-codes"
    ]


def test_a_weight_of_the_bits_asked_for_keeps_them_by_another_option(tmp_path, adapter):
    base, _, _ = base_of("FP8 blocks", tmp_path / "base")
    with pytest.raises(UnsupportedError, match=r"has 8 bits needs no other.*`requantize=True`"):
        lt.fuse(base, adapter(128)[0], changed_bits=8)


def test_ways_to_store_changed_weights_exclude_each_other(tmp_path, adapter):
    base, _, _ = base_of("MLX 4", tmp_path / "base")
    folder, _ = adapter(128)
    with pytest.raises(OptionError, match=r"`requantize` and `changed_bits` exclude"):
        lt.fuse(base, folder, requantize=True, changed_bits=8)
    with pytest.raises(OptionError, match=r"`changed_bits` and `dtype` exclude"):
        lt.fuse(base, folder, changed_bits=8, dtype="bf16")
    with pytest.raises(UnsupportedError, match=r"cannot be written in 6 bits.*MLX affine, 4 bits"):
        lt.fuse(base, folder, changed_bits=6)


def test_formats_without_entries_of_modules_refuse_other_bits(tmp_path, adapter):
    base, _, _ = base_of("GPTQ 4", tmp_path / "base")
    with pytest.raises(UnsupportedError, match=r"cannot be written in 8 bits.*GPTQ.*16 bits"):
        lt.fuse(base, adapter(128)[0], changed_bits=8)


def test_a_plain_base_has_no_format_to_keep(tmp_path, adapter):
    tensors = {f"{CHANGED}.weight": np.ones((64, 128), np.float16)}
    base = save(tmp_path / "base", tensors, {"model_type": "llama"})
    with pytest.raises(OptionError, match="only a quantised base"):
        lt.fuse(base, adapter(128)[0], requantize=True)


@pytest.mark.parametrize("name", ["MLX 4", "MLX mxfp4", "MLX nvfp4"])
def test_changed_modules_of_mlx_in_eight_bits(name, tmp_path, adapter):
    """One entry a module; eight bits hold the change; everything else stays byte for byte."""
    base, _, told = base_of(name, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    section = {"bits": 4, "group_size": 64}
    if "mx" in name or "nv" in name:
        section = {"bits": 4, "group_size": 16 if "nv" in name else 32, "mode": name[4:]}
    config["quantization"] = section
    (base / "config.json").write_text(json.dumps(config))
    before = values_of(base, told)
    folder, weight = adapter(128, 0.3 * np.abs(before).mean())
    result = lt.fuse(base, {folder: weight}, changed_bits=8, output=tmp_path / "fused")
    assert result.quantising_error < 0.1
    entries = json.loads((tmp_path / "fused" / "config.json").read_text())["quantization"]
    group = 64 if name == "MLX 4" else 32
    want = {"group_size": group, "bits": 8} | ({} if name == "MLX 4" else {"mode": "affine"})
    assert entries == section | {CHANGED: want}
    own = read_checkpoint(tmp_path / "fused").tensors
    assert own[f"{CHANGED}.weight"].shape == (64, 32)
    for key, data in raw(base).items():
        if not key.startswith(CHANGED):
            assert raw(tmp_path / "fused")[key] == data
    plain = lt.dequantize(tmp_path / "fused", dtype="f32", output=tmp_path / "plain")
    assert len(plain.tensors) == 2
    after = read_checkpoint(tmp_path / "plain").tensors[f"{CHANGED}.weight"].load(np.float64)
    change = weight * lt.delta(lt.read(folder), CHANGED)
    error = np.linalg.norm(after - before - change) / np.linalg.norm(change)
    assert result.quantising_error == pytest.approx(error, rel=1e-4)


def test_each_module_of_mlx_in_eight_bits_has_its_own_group(tmp_path):
    """Modules with groups of different sizes, as mlx-lm's own predicates make them."""
    tensors, factors, rng = {}, {}, np.random.default_rng(3)
    groups = {"layers.0.q": 64, "layers.0.up": 32, "layers.1.up": 128}
    for module, group in groups.items():
        made, _ = mlx(rng, 4, group=group)
        tensors |= {key.replace("x.", f"{module}.", 1): value for key, value in made.items()}
        for part, shape in (("A", (2, 128)), ("B", (64, 2))):
            values = rng.normal(size=shape).astype(np.float32)
            factors[f"base_model.model.{module}.lora_{part}.weight"] = values
    own = {"layers.0.up": {"group_size": 32, "bits": 4}, "layers.1.up": {"group_size": 128}}
    section = {"group_size": 64, "bits": 4, **own}
    config = {"model_type": "llama", "quantization": section, "quantization_config": section}
    base = save(tmp_path / "base", tensors, config)
    folder = save(tmp_path / "a", factors, {})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q", "up"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    lt.fuse(base, folder, changed_bits=8, output=tmp_path / "fused")
    stored = read_checkpoint(tmp_path / "fused").tensors
    found = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert found["quantization"] == found["quantization_config"]
    for module, group in groups.items():
        assert stored[f"{module}.scales"].shape == (64, 128 // group)
        assert found["quantization"][module] == {"group_size": group, "bits": 8}


@pytest.mark.parametrize("name", ["MLX 4", "GPTQ 4", "packed 4", "FP8 a row", "NVFP4 ModelOpt"])
def test_who_asks_for_the_original_is_not_given_a_quantised_base(name, tmp_path, adapter):
    base, _, _ = base_of(name, tmp_path / "base")
    with pytest.raises(OptionError, match=r"the base is quantised.*groups|bits"):
        lt.fuse(base, adapter(128)[0], base_mode="original")
    assert lt.fuse(base, tmp_path / "adapter", base_mode="dequant").tensors
