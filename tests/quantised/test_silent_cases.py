"""Bases that other tools get wrong without a word, and what is said of them here."""

import json

import numpy as np
import pytest
from encoder_cases import CASES
from quantised_cases import only, pairs
from test_written_back import CHANGED, KEPT, base_of, raw, save, values_of

import loratools as lt
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.disk.errors import AdapterError, LoratoolsError, UnsupportedError

RNG = np.random.default_rng(5)
F8 = DTYPES["F8_E4M3"].numpy_dtype()


@pytest.fixture
def adapter(make_folder):
    return make_folder(modules={CHANGED: (64, 128, 8)}, dtype="f32")


def set_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    section = {**config.get("quantization_config", {}), **entries}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": section}))


@pytest.mark.parametrize("options", [{}, {"requantize": True}, {"dtype": "bf16"}])
@pytest.mark.parametrize("name", ["packed 4", "FP8 a row", "NVFP4 compressed-tensors"])
def test_rotated_weights_are_refused_whatever_is_to_be_written(name, options, tmp_path, adapter):
    """The stored weight is rotated: W + ΔW of it is another model's."""
    base, _, _ = base_of(name, tmp_path / "base")
    transform = {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}
    set_config(base, transform_config=transform)
    with pytest.raises(UnsupportedError, match=r"rotated \(transform_config"):
        lt.fuse(base, adapter, output=tmp_path / "fused", **options)
    set_config(base, transform_config={})
    assert lt.fuse(base, adapter, **options).tensors


@pytest.mark.parametrize("name", ["NVFP4 ModelOpt", "packed 4", "INT8 (64, 1)"])
def test_scales_of_inputs_beside_other_formats_are_refused(name, tmp_path, adapter):
    """ModelOpt's AWQ multiplies the layer's inputs: the weight that acts is another."""
    base, tensors, _ = base_of(name, tmp_path / "base")
    scale = np.full(128, 2, np.float32)
    config = json.loads((base / "config.json").read_text())
    with_scale = save(tmp_path / "scaled", {**tensors, f"{CHANGED}.pre_quant_scale": scale}, config)
    for options in ({}, {"requantize": True}):
        with pytest.raises(UnsupportedError, match=r"cannot be read.*pre_quant_scale"):
            lt.fuse(with_scale, adapter, **options)


def test_scales_of_inputs_beside_fp8_count_when_it_is_written_back(tmp_path, adapter):
    base, _, told = base_of("FP8 inputs", tmp_path / "base")
    before = values_of(base, told)
    change = lt.delta(lt.read(adapter), CHANGED)
    weight = 0.2 * np.abs(before).mean() / np.abs(change).mean()
    lt.fuse(base, {adapter: weight}, requantize=True, output=tmp_path / "fused")
    moved = values_of(tmp_path / "fused", told) - before
    share = np.vdot(moved, weight * change) / np.vdot(weight * change, weight * change)
    assert 0.9 < share < 1.1


def test_tensors_decide_where_no_configuration_says_anything(tmp_path, adapter):
    """NVIDIA's releases have hf_quant_config.json only, which may exclude what is quantised."""
    tensors, _ = CASES["NVFP4 ModelOpt"](np.random.default_rng(0))
    renamed = {
        k.replace("x.", f"{m}.", 1): v for m in (CHANGED, "lm_head") for k, v in tensors.items()
    }
    base = save(tmp_path / "base", renamed, {"model_type": "llama"})
    stated = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    about = {"producer": {"name": "modelopt"}, "quantization": stated}
    (base / "hf_quant_config.json").write_text(json.dumps(about))
    result = lt.dequantize(base, dtype="f32", output=tmp_path / "plain")
    assert {tensor.name for tensor in result.tensors} == {f"{CHANGED}.weight", "lm_head.weight"}
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    lt.fuse(base, adapter, requantize=True, allow_lossy=True, output=tmp_path / "fused")
    kept = (tmp_path / "fused" / "hf_quant_config.json").read_bytes()
    assert kept == (base / "hf_quant_config.json").read_bytes()


def test_no_scale_is_computed_anew_where_that_moves_the_weights(tmp_path, adapter):
    """amax / 7.5 is not idempotent: fresh scales move a symmetric base by 7 % of itself."""
    base, _, told = base_of("packed 4", tmp_path / "base")
    change = lt.delta(lt.read(adapter), CHANGED)
    tiny = 1e-6 * np.abs(values_of(base, told)).mean() / np.abs(change).mean()
    lt.fuse(base, {adapter: tiny}, requantize=True, allow_lossy=True, output=tmp_path / "fused")
    assert raw(tmp_path / "fused") == raw(base)


@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round", "auto_round:gptqmodel"])
def test_auto_round_in_the_form_of_gptq(packing, tmp_path, adapter):
    """Zeros are stored less one in one of its forms, as they are in the others; both go back."""
    base, _, told = base_of("GPTQ 4", tmp_path / "base")
    said = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32}
    set_config(base, **said)
    told = {"stated": said}
    before = values_of(base, told)
    plain = values_of(base, {"stated": {"quant_method": "gptq"}})
    assert np.array_equal(before, plain) == (packing == "auto_round:auto_gptq")
    change = lt.delta(lt.read(adapter), CHANGED)
    weight = 0.3 * np.abs(before).mean() / np.abs(change).mean()
    result = lt.fuse(
        base, {adapter: weight}, requantize=True, allow_lossy=True, output=tmp_path / "fused"
    )
    moved = values_of(tmp_path / "fused", told) - before
    share = np.vdot(moved, weight * change) / np.vdot(weight * change, weight * change)
    assert result.surviving == pytest.approx(share, abs=1e-4)


def test_auto_round_in_the_form_of_awq(tmp_path, adapter):
    base, _, told = base_of("AWQ gemm", tmp_path / "base")
    before = values_of(base, told)
    set_config(base, quant_method="auto-round", packing_format="auto_round:auto_awq")
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    np.testing.assert_array_equal(values_of(base, {"stated": config}), before)
    assert lt.fuse(base, adapter, requantize=True).tensors


def test_auto_round_without_a_packing_has_zeros_less_one():
    """transformers' AutoRoundConfig begins as `auto_round:gptq`; only the file changes that."""
    tensors, _ = CASES["GPTQ 4"](np.random.default_rng(0))
    found = [
        only(tensors, {"quant_method": "auto-round", **said}).tensor().load(np.float32)
        for said in ({}, {"packing_format": "auto_round:gptq"}, {"packing_format": "auto_round"})
    ]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_codes_that_only_the_configuration_tells_apart():
    """AutoRound's MXINT4 has the tensors of MXFP4; entries of layers say which one is which."""
    tensors, _ = CASES["MXINT4"](np.random.default_rng(0))
    said = {"quant_method": "auto-round", "data_type": "mx_fp"}
    assert str(only(tensors, said).scheme) == "MXFP4, 4 bits, groups of 32"
    for name in ("x", r"x|lm_head"):
        stated = {**said, "extra_config": {name: {"data_type": "mx_int"}}}
        assert str(only(tensors, stated).scheme) == "MXINT4, 4 bits, groups of 32"


@pytest.mark.parametrize("entry", ["rotation_config", "hadamard_config", "spinquant_config"])
def test_auto_round_with_a_rotation_is_refused(entry, tmp_path, adapter):
    base, _, _ = base_of("GPTQ 4", tmp_path / "base")
    set_config(base, quant_method="auto-round", packing_format="auto_round", **{entry: {"a": 1}})
    with pytest.raises(UnsupportedError, match="rotated"):
        lt.fuse(base, adapter, requantize=True)


def test_experts_of_gpt_oss_stay_where_only_attention_changes(tmp_path, adapter):
    """No expert is decoded, and none changes a byte, with the format kept or not."""
    experts = {
        "model.layers.0.mlp.experts.down_proj_blocks": pairs(RNG.integers(0, 16, (2, 64, 2, 32))),
        "model.layers.0.mlp.experts.down_proj_scales": np.full((2, 64, 2), 120, np.uint8),
        f"{CHANGED}.weight": np.ones((64, 128), np.float32),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    base = save(tmp_path / "base", experts, config)
    for number, options in enumerate(({}, {"requantize": True})):
        lt.fuse(base, adapter, output=tmp_path / f"fused{number}", **options)
        before, after = raw(base), raw(tmp_path / f"fused{number}")
        assert set(before) == set(after)
        assert [key for key in before if before[key] != after[key]] == [f"{CHANGED}.weight"]
        kept = (tmp_path / f"fused{number}" / "config.json").read_bytes()
        assert kept == (base / "config.json").read_bytes()


def test_experts_of_gpt_oss_as_their_parameter(tmp_path):
    """The parameter is the transpose of what is stored, under a name of its own."""
    name = "model.layers.0.mlp.experts.down_proj"
    codes = RNG.integers(0, 16, (2, 64, 4, 32))
    scales = RNG.integers(118, 124, (2, 64, 4)).astype(np.uint8)
    base = save(
        tmp_path / "base",
        {f"{name}_blocks": pairs(codes), f"{name}_scales": scales},
        {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
    )
    told = {"stated": {"quant_method": "mxfp4"}}

    def values(folder):
        own = {
            k: np.frombuffer(t.raw(), np.uint8).reshape(t.shape)
            for k, t in read_checkpoint(folder).tensors.items()
        }
        return only(own, **told).tensor().load(np.float64)

    before = values(base)
    assert before.shape == (2, 128, 64)
    lt.dequantize(base, dtype="f32", output=tmp_path / "plain")
    plain = read_checkpoint(tmp_path / "plain").tensors
    assert list(plain) == [name]
    np.testing.assert_array_equal(plain[name].load(np.float64), before)


def test_kept_weights_stay_quantised_beside_changed_ones(tmp_path, adapter):
    """Without an option MLX's other modules keep every byte."""
    base, _, _ = base_of("MLX 4", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization"] = {"bits": 4, "group_size": 64}
    (base / "config.json").write_text(json.dumps(config))
    lt.fuse(base, adapter, output=tmp_path / "fused")
    before, after = raw(base), raw(tmp_path / "fused")
    for leaf in ("weight", "scales", "biases"):
        assert before[f"{KEPT}.{leaf}"] == after[f"{KEPT}.{leaf}"]


@pytest.mark.parametrize("options", [{}, {"requantize": True}])
@pytest.mark.parametrize("place", ["meta of gptqmodel", "a file beside", "is_rotated"])
def test_rotations_are_refused_wherever_they_are_said(place, options, tmp_path, adapter):
    base, _, told = base_of("GPTQ 4", tmp_path / "base")
    if place == "a file beside":
        config = json.loads((base / "config.json").read_text())
        del config["quantization_config"]
        (base / "config.json").write_text(json.dumps(config))
        said = {**told["stated"], "rotation": "hadamard"}
        (base / "quantize_config.json").write_text(json.dumps(said))
    else:
        said = {"is_rotated": True} if place == "is_rotated" else {"meta": {"rotation": "random"}}
        set_config(base, **said)
    with pytest.raises(UnsupportedError, match="rotated"):
        lt.fuse(base, adapter, **options)


LEAVES = ("perm", "channel_scale", "smooth_factor", "weight_global_scale", "weight_g_idx", "act")


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize(
    "name", ["FP8 a row", "GPTQ 4", "AWQ gemm", "MLX 4", "NVFP4 ModelOpt", "torchao INT8"]
)
def test_tensors_that_may_change_what_a_weight_means_are_refused(name, leaf, tmp_path, adapter):
    """A layer has a weight and a bias. A scale or an order that nobody reads would be lost."""
    base, tensors, told = base_of(name, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    if name == "MLX 4":
        config["quantization"] = {"bits": 4, "group_size": 64}
    about = {
        key.replace("x.", f"{module}."): text
        for key, text in told.get("metadata", {}).items()
        for module in (CHANGED, KEPT)
    }
    extra = {f"{CHANGED}.{leaf}": np.ones(128, np.float32)}
    strange = save(tmp_path / "strange", {**tensors, **extra}, config, about)
    for options in ({}, {"requantize": True}):
        with pytest.raises(UnsupportedError, match=rf"may change what they mean.*{leaf}"):
            lt.fuse(strange, adapter, **options)
    biased = {f"{CHANGED}.bias": np.ones(64, np.float32)}
    assert lt.fuse(save(tmp_path / "biased", {**tensors, **biased}, config, about), adapter).tensors


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_weight_whose_part_is_missing_is_refused(name, tmp_path):
    """What is left of it is no plain tensor. A zero point or an order may be left out."""
    base, tensors, told = base_of(name, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    about = {
        key.replace("x.", f"{module}."): text
        for key, text in told.get("metadata", {}).items()
        for module in (CHANGED, KEPT)
    }
    optional = ("g_idx", "zero_point", "pre_quant_scale", "shape")
    parts = [k for k in tensors if k.startswith((CHANGED, "m.")) and not k.endswith(optional)]
    for number, part in enumerate(parts):
        rest = {key: value for key, value in tensors.items() if key != part}
        broken = save(tmp_path / f"broken{number}", rest, config, about)
        with pytest.raises(LoratoolsError) as refused:
            lt.dequantize(broken, output=tmp_path / "plain")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("leaf", ["foo", "zero_point", "order", "scales_2", "blocks_foo"])
def test_tensors_named_after_experts_are_refused(leaf, tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {
        f"{name}_blocks": pairs(RNG.integers(0, 16, (2, 64, 2, 32))),
        f"{name}_scales": np.full((2, 64, 2), 120, np.uint8),
        f"{name}_bias": np.ones((2, 64), np.float32),
        f"{name}_input_scale": np.ones(1, np.float32),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    base = save(tmp_path / "base", tensors, config)
    lt.dequantize(base, output=tmp_path / "plain")
    assert set(read_checkpoint(tmp_path / "plain").tensors) == {name, f"{name}_bias"}
    for beside in (f"{name}_{leaf}", f"{name}.{leaf}"):
        strange = {**tensors, beside: np.ones((2, 64), np.float32)}
        folder = save(tmp_path / beside.rpartition("experts")[2], strange, config)
        with pytest.raises(UnsupportedError, match=rf"may change what they mean.*{beside}"):
            lt.dequantize(folder, output=tmp_path / "plain2")
    for part in ("blocks", "scales"):
        rest = {key: value for key, value in tensors.items() if key != f"{name}_{part}"}
        with pytest.raises(UnsupportedError, match="other parts are missing or wrong"):
            lt.dequantize(save(tmp_path / part, rest, config), output=tmp_path / "plain2")


def test_what_a_configuration_says_of_missing_tensors():
    """Zero points, orders of columns and ends of rows that are stated must be there."""
    group = {"num_bits": 4, "group_size": 64, "symmetric": False}

    def stated(**weights):
        groups = {"group_0": {"weights": {**group, **weights}}}
        return {"quant_method": "compressed-tensors", "config_groups": groups}

    tensors, _ = CASES["packed 4, zeros"](RNG)
    assert only(tensors, stated())
    del tensors["x.weight_zero_point"]
    with pytest.raises(AdapterError, match=r"is missing.*weight_zero_point"):
        only(tensors, stated())
    assert only(tensors, stated(symmetric=True))
    with pytest.raises(AdapterError, match=r"is missing.*weight_g_idx"):
        only(tensors, stated(symmetric=True, actorder="group"))
    del tensors["x.weight_shape"]
    assert only(tensors, stated(symmetric=True))
    with pytest.raises(AdapterError, match=r"may end inside of a word.*weight_shape"):
        only(tensors, stated(symmetric=True, group_size=32))
    ordered, _ = CASES["GPTQ 4"](RNG)
    with pytest.raises(AdapterError, match=r"out of order.*g_idx"):
        only(ordered, {"quant_method": "gptq", "desc_act": True})


def test_scaled_activations_of_autoawq_are_refused(tmp_path):
    """Of falcon, bloom, starcoder2 and others AutoAWQ divides an activation by these scales.

    The plain model has no such scales: its weight would be another.
    """
    tensors, told = CASES["AWQ gemm"](np.random.default_rng(0))
    named = {k.replace("x.", "transformer.h.0.mlp.c_proj.", 1): v for k, v in tensors.items()}
    scales = {"transformer.h.0.mlp.act.scales": np.full(128, 2, np.float16)}
    config = {"model_type": "starcoder2", "quantization_config": told["stated"]}
    base = save(tmp_path / "base", {**named, **scales}, config)
    with pytest.raises(UnsupportedError, match=r"may change what they mean.*mlp.act.scales"):
        lt.dequantize(base, output=tmp_path / "plain")


@pytest.mark.parametrize("section", [None, {"quant_method": "metal", "bits": 4, "group_size": 64}])
def test_eight_bits_need_a_place_to_say_so(section, tmp_path, adapter):
    """Without entries of modules a loader would take eight bits for four."""
    name = "MLX mxfp4" if section is None else "MLX 4"
    base, _, _ = base_of(name, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config.pop("quantization", None)
    if section is not None:
        config["quantization_config"] = section
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"describe how single modules.*`changed_bits`"):
        lt.fuse(base, adapter, changed_bits=8, output=tmp_path / "fused")
    assert lt.fuse(base, adapter, output=tmp_path / "fused").tensors


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", ["NVFP4 ModelOpt", "NVFP4 compressed-tensors"])
def test_nvfp4_without_scales_of_groups_is_refused_by_name(name, shape, tmp_path, make_folder):
    """No loader takes one scale for all. Where no adapter changes the weight, it stays."""
    _, tensors, _ = base_of(name, tmp_path / "base")
    tensors[f"{KEPT}.weight_scale"] = (np.ones(shape, F8), "F8_E4M3")
    plain = {f"{CHANGED}.weight": np.ones((64, 128), np.float16)}
    kept = {key: value for key, value in tensors.items() if not key.startswith(CHANGED)}
    config = {"model_type": "llama", "quantization_config": {"quant_method": "modelopt"}}
    base = save(tmp_path / "lone", plain | kept, config)
    for touched in (KEPT, CHANGED):
        adapter = make_folder(touched, modules={touched: (64, 128, 8)}, dtype="f32")
        if touched == KEPT:
            with pytest.raises(UnsupportedError, match=r"one scale for all.*weight_scale"):
                lt.fuse(base, adapter)
            continue
        lt.fuse(base, adapter, output=tmp_path / "fused")
        before, after = raw(base), raw(tmp_path / "fused")
        assert [key for key in before if before[key] != after[key]] == [f"{CHANGED}.weight"]
    with pytest.raises(UnsupportedError, match=r"one scale for all.*expected \[64, 8\]"):
        lt.dequantize(base, output=tmp_path / "plain")
