"""Stacks whose sides are alike, one parameter alone, and names of single experts, beside PEFT.

Where a stack is square, or of one parameter alone, shapes do not tell on which side A is or which
parameter is meant. PEFT's own merge in float64 says what is right.
"""

import json
import warnings

import numpy as np
import pytest
import tiny_models
from expert_models import ROUNDING, Model, off
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats.disk.errors import AdapterError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Future", "User", "Runtime")
]

WIDTH = tiny_models.SIZES["hidden_size"]

SQUARE = [
    ("Qwen3MoeForCausalLM", WIDTH // 2), ("GptOssForCausalLM", WIDTH // 2),
    ("GptOssForCausalLM", WIDTH), ("Llama4ForCausalLM", WIDTH // 2),
    ("Llama4ForCausalLM", WIDTH), ("NemotronHForCausalLM", WIDTH),
    ("MixtralForCausalLM", WIDTH // 2),
]  # fmt: skip
OTHERS = {
    "each": {"experts": "each"},
    "3d": {"experts": "3d"},
    "0.18": {"experts": "stacked", "peft_layout": "0.18"},
    "mlx": {"to": "mlx"},
    "names of 4": {"names_of": "4"},
}


@pytest.mark.slow
@pytest.mark.parametrize("which", ["both", "first", "last"])
@pytest.mark.parametrize(("name", "inner"), SQUARE)
def test_square_stacks_meet_other_spellings(name, inner, which, tmp_path):
    """convert, merge and compare, from every spelling and with each of the two first."""
    model = Model(name, inner, tmp_path)
    first, last = sorted(model.parameters, key=lambda name: "down" in name)
    parameters = {"both": None, "first": [first], "last": [last]}[which]
    adapter = model.adapter("a", parameters)
    wanted = model.change(adapter)
    for title, asked in OTHERS.items():
        other = tmp_path / title
        if (name, title) == ("Llama4ForCausalLM", "mlx"):
            with pytest.raises(UnsupportedError, match="mlx-lm has no such layer"):
                lt.convert(adapter, base=model.base, output=other, **asked)
            continue
        lt.convert(adapter, base=model.base, output=other, **asked)
        for more in ({"to": "peft"}, {"for_": "peft"}):
            out = tmp_path / f"{title} {next(iter(more))}"
            lt.convert(other, base=model.base, output=out, **more)
            found = model.fused(out) if more == {"to": "peft"} else model.change(out)
            assert off(found, wanted) <= ROUNDING, (title, more)
        (compared,) = {
            round(module.cosine, 9)
            for module in lt.compare([adapter, other], base=model.base).modules
        }
        assert compared == 1.0, title
        pairs = [(adapter, other)] if title == "mlx" else [(adapter, other), (other, adapter)]
        for index, pair in enumerate(pairs):
            out = tmp_path / f"{title} merged {index}"
            lt.merge(list(pair), base=model.base, output=out)
            lt.convert(out, base=model.base, for_="peft", output=f"{out} peft")
            assert off(model.change(f"{out} peft"), wanted, wanted) <= ROUNDING, (title, index)


@pytest.mark.parametrize(
    ("name", "inner"), [("NemotronHForCausalLM", 24), ("NemotronHForCausalLM", WIDTH)]
)
def test_one_parameter_alone_has_the_name_of_the_last(name, inner, tmp_path):
    """A file of up alone and one of down alone have one module name, and nothing to add up."""
    model = Model(name, inner, tmp_path)
    down, up = model.parameters
    ups, downs = model.adapter("up", [up]), model.adapter("down", [down])
    with pytest.raises(AdapterError, match=r"down_proj; expected .*up_proj, as up has it") as told:
        lt.merge([ups, downs], output=tmp_path / "no")
    assert "`base`" in told.value.hint
    with pytest.raises(AdapterError, match="no module"):
        lt.compare([ups, downs])
    lt.merge([ups, downs], base=model.base, output=tmp_path / "both", allow_missing=True)
    found = model.change(tmp_path / "both")
    assert off(found, model.change(ups), model.change(downs)) <= 2.0**-48


def test_both_parameters_and_one_alone_are_merged(tmp_path):
    model = Model("GptOssForCausalLM", WIDTH // 2, tmp_path)
    both, alone = model.adapter("a"), model.adapter("gate_up", model.parameters[-1:])
    for index, pair in enumerate(([both, alone], [alone, both])):
        lt.merge(pair, base=model.base, output=tmp_path / f"m{index}")
        found = model.change(tmp_path / f"m{index}")
        assert off(found, model.change(both), model.change(alone)) <= 2.0**-48


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("MixtralForCausalLM", "model.layers.0.block_sparse_moe.experts.0.w1"),
        ("MiniMaxM2ForCausalLM", "model.layers.0.block_sparse_moe.experts.0.w1"),
        ("KimiLinearForCausalLM", "model.layers.1.block_sparse_moe.experts.0.w1"),
        ("NemotronHForCausalLM", "model.layers.1.mixer.experts.0.up_proj"),
        ("DeepseekV4ForCausalLM", "model.layers.0.ffn.experts.0.w1"),
    ],
)
def test_single_experts_are_called_as_in_the_models_files(name, path, tmp_path):
    """What loads single experts has their names in files; PEFT on transformers 5 has them, too."""
    model = Model(name, 24, tmp_path)
    adapter = model.adapter("a", use_rslora=False)  # of which PEFT's own way to stacks takes √2
    for index, asked in enumerate(({"experts": "each"}, {"for_": "vllm"}, {"for_": "sglang"})):
        out = tmp_path / f"each{index}"
        lt.convert(adapter, base=model.base, output=out, **asked)
        stored = load_file(out / "adapter_model.safetensors")
        assert f"base_model.model.{path}.lora_A.weight" in stored
        assert off(model.fused(out), model.change(adapter)) <= ROUNDING
    if name in ("MixtralForCausalLM", "MiniMaxM2ForCausalLM"):
        assert off(model.change(out), model.change(adapter)) <= 2.0**-48
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if name == "MixtralForCausalLM":  # which PEFT's `auto_mapping` tells
        lt.convert(adapter, experts="each", output=tmp_path / "no base")
        again = load_file(tmp_path / "no base" / "adapter_model.safetensors")
        assert all(np.array_equal(again[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", ["Aria", "Kimi_K25"])
def test_single_experts_of_a_language_model_that_files_call_otherwise(name, tmp_path):
    model = Model(f"{name}ForConditionalGeneration", 24, tmp_path)
    adapter = model.adapter("a")
    lt.convert(adapter, base=model.base, experts="each", output=tmp_path / "each")
    assert off(model.fused(tmp_path / "each"), model.change(adapter)) <= ROUNDING


@pytest.mark.parametrize("source", ["mlx", "gguf"])
def test_experts_alone_leave_other_modules_of_the_model_alone(source, tmp_path):
    """PEFT adapts modules of its own choice where the configuration names none."""
    model = Model("NemotronHForCausalLM", 24, tmp_path)
    adapter = model.adapter("a")
    held = tmp_path / ("a.gguf" if source == "gguf" else "held")
    lt.convert(adapter, to=source, base=model.base, output=held)
    lt.convert(held, to="peft", base=model.base, output=tmp_path / "again")
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert off(model.change(tmp_path / "again"), model.change(adapter)) <= 2.0**-20


def test_the_base_tells_the_side_that_the_file_does_not(tmp_path):
    """JetMoE's two stacks are modules of their own, and without a gate."""
    model = Model("JetMoeForCausalLM", 16, tmp_path)
    adapter = model.adapter("a")
    asked = {"experts": "stacked", "peft_layout": "0.18"}
    lt.convert(adapter, base=model.base, output=tmp_path / "old", **asked)
    lt.convert(tmp_path / "old", to="peft", base=model.base, output=tmp_path / "new")
    assert off(model.change(tmp_path / "new"), model.change(adapter)) <= 2.0**-48


SETTINGS = {
    "as it is": {},
    "all of down": {"alpha_pattern": {"w2": 5}},
    "all of gate and up": {"alpha_pattern": {"w1": 5, "w3": 5}},
    "one expert": {"alpha_pattern": {"experts.1.w2": 5}},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("which", SETTINGS)
def test_check_tells_what_peft_scales_otherwise(which, tmp_path):
    """Single experts whose stacks PEFT gives the scale of the configuration."""
    model = Model("MixtralForCausalLM", 24, tmp_path)
    adapter = model.adapter("a", use_rslora=False)
    lt.convert(adapter, base=model.base, experts="each", output=tmp_path / "each")
    file = tmp_path / "each" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | SETTINGS[which]))
    error = off(model.change(tmp_path / "each"), model.fused(tmp_path / "each"))
    found = {finding.code for finding in lt.check(tmp_path / "each", base=model.base).findings}
    assert (error > ROUNDING) == ("LT411" in found)
    assert (error > ROUNDING) == (which != "as it is")
    said = lt.convert(tmp_path / "each", to="peft", output=tmp_path / "again").findings
    assert (error > ROUNDING) == ("experts-lost" in {finding.code for finding in said})
    asked = {"experts": "stacked", "base": model.base}
    stacked = lt.convert(tmp_path / "each", output=tmp_path / "stacked", **asked)
    assert "experts-lost" not in {finding.code for finding in stacked.findings}
    assert off(model.change(tmp_path / "stacked"), model.fused(tmp_path / "each")) <= ROUNDING


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("Qwen3MoeForCausalLM", False),
        ("Qwen2MoeForCausalLM", True),
        ("Kimi_K25ForConditionalGeneration", True),
    ],
)
def test_experts_that_peft_does_not_find_one_by_one_are_told(name, lost, tmp_path):
    """PEFT loads the file with a warning about other names at most, and changes no expert."""
    model = Model(name, 24, tmp_path)
    adapter = model.adapter("a", use_rslora=False)
    each = tmp_path / "each"
    said = lt.convert(adapter, base=model.base, experts="each", output=each).findings
    assert ("experts-lost" in {finding.code for finding in said}) == lost
    found = lt.check(each, base=model.base).findings
    assert ("LT411" in {finding.code for finding in found}) == lost
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(model.loaded(), str(each)).merge_and_unload()
    stacks = {n: w for n, w in loaded.named_parameters() if n.endswith(tuple(model.parameters))}
    change = {n: stacks[n].detach() - model.old[n] for n in stacks}
    wanted = model.change(adapter)
    if lost:
        assert not any(each.any() for each in change.values())
    else:
        assert off(change, {n: wanted[n] for n in change}) <= ROUNDING


@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj", "both"])
def test_check_tells_what_peft_leaves_out_of_single_experts(which, tmp_path):
    model = Model("MixtralForCausalLM", 24, tmp_path)
    asked = ["gate_up_proj", "down_proj"] if which == "both" else [which]
    parameters = [f"mlp.experts.{leaf}" for leaf in asked]
    adapter = model.adapter("a", parameters, use_rslora=False)
    each = tmp_path / "each"
    said = lt.convert(adapter, base=model.base, names_of="4", output=each).findings
    told = {finding.code for finding in said}
    found = {finding.code for finding in lt.check(each, base=model.base).findings}
    squeezed = lt.squeeze(each, energy=1.0, uniform=True)
    assert ("experts-lost" in told) == ("experts-lost" in {f.code for f in squeezed.findings})
    if which == "gate_up_proj":
        with pytest.raises(UserWarning, match="missing adapter keys"):
            model.change(each)
        assert "experts-lost" in told
        assert "LT411" in found
    else:
        assert off(model.change(each), model.change(adapter)) <= ROUNDING
        assert "experts-lost" not in told
        assert "LT411" not in found
    assert off(model.fused(each), model.change(adapter)) <= ROUNDING


ONE_SCALE = {
    "stacked": {"experts": "stacked"}, "3d": {"experts": "3d"}, "tinker": {"to": "tinker"},
    "names of 5": {"names_of": "5"}, "mlx": {"to": "mlx"}, "gguf": {"to": "gguf"},
}  # fmt: skip


@pytest.mark.parametrize("layout", ONE_SCALE)
def test_what_one_scale_for_several_rounds_is_told(layout, tmp_path):
    """A stack has one scale, and experts one by one may have others; their ratio rounds B."""
    model = Model("MixtralForCausalLM", 24, tmp_path)
    each = tmp_path / "each"
    lt.convert(model.adapter("a", use_rslora=False), base=model.base, names_of="4", output=each)
    file = each / "adapter_config.json"
    scales = {"alpha_pattern": {"experts.1.w2": 5, "experts.2.w1": 7}}
    file.write_text(json.dumps(json.loads(file.read_text()) | scales))
    out = tmp_path / ("out.gguf" if layout == "gguf" else "out")
    done = lt.convert(each, base=model.base, output=out, **ONE_SCALE[layout])
    asked = {"to": "peft", "experts": "each", "base": model.base}
    lt.convert(out, output=tmp_path / "again", **asked)
    before, after = lt.read(each), lt.read(tmp_path / "again")
    changes = [[lt.delta(each, name) for name in before.modules] for each in (before, after)]
    error, whole = (
        np.sqrt(sum(np.vdot(change, change) for change in some))
        for some in ([y - x for x, y in zip(*changes, strict=True)], changes[0])
    )
    assert 0.0 < error / whole <= 2.0**-24
    assert done.relative_error == pytest.approx(error / whole, rel=1e-6)


@pytest.mark.parametrize("how", ["convert", "merge", "squeeze"])
def test_experts_trained_with_dropout_load_in_peft(how, tmp_path):
    """PEFT on transformers 5 stacks single experts, and its parameters bear no dropout."""
    model = Model("MixtralForCausalLM", 24, tmp_path)
    adapter, each, out = model.adapter("a"), tmp_path / "each", tmp_path / "out"
    lt.convert(adapter, base=model.base, names_of="4", output=each)
    file = each / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_dropout": 0.05}))
    with pytest.raises(ValueError, match="lora_dropout"):
        model.change(each)
    assert "LT414" in {finding.code for finding in lt.check(each).findings}
    result = {
        "convert": lambda: lt.convert(each, base=model.base, names_of="5", output=out),
        "merge": lambda: lt.merge([each, adapter], base=model.base, output=out),
        "squeeze": lambda: lt.squeeze(each, energy=1.0, uniform=True, output=out),
    }[how]()
    assert "dropout-left-out" in {finding.code for finding in result.findings}
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.0
    twice = 2 if how == "merge" else 1
    wanted = {name: twice * change for name, change in model.change(adapter).items()}
    assert off(model.change(out), wanted) <= ROUNDING


def test_biases_of_factors_do_not_go_beside_experts(tmp_path):
    """PEFT would stop with an error when it loads them."""
    model = Model("MixtralForCausalLM", 24, tmp_path)
    experts = model.adapter("a", target_modules=["o_proj"])
    biased = tmp_path / "biased"
    config = LoraConfig(target_modules=["o_proj"], lora_bias=True, init_lora_weights=False)
    get_peft_model(model.loaded(), config).save_pretrained(str(biased))
    for output in (tmp_path / "out", None):
        with pytest.raises(lt.LoratoolsError, match="lora_bias"):
            lt.merge([biased, experts], output=output)
    assert not (tmp_path / "out").exists()


def test_biases_of_factors_beside_experts_are_measured_and_not_written(tmp_path):
    model = Model("MixtralForCausalLM", 24, tmp_path)
    folder = model.adapter("a", target_modules=["o_proj"], use_rslora=False)
    weights = load_file(folder / "adapter_model.safetensors")
    weights |= {
        key.replace("weight", "bias"): np.ones(len(value), np.float32)
        for key, value in weights.items()
        if "o_proj.lora_B" in key
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    stated = {"lora_bias": True, "lora_dropout": 0.1}
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    measured = lt.spectrum(folder)
    assert measured.suggestions
    assert measured.frobenius > 0
    assert "LT414" in {finding.code for finding in lt.check(folder).findings}
    with pytest.raises(UnsupportedError, match="lora_bias"):
        lt.squeeze(folder, rank=2, output=tmp_path / "out")


def test_names_of_4_stay_what_they_are(tmp_path):
    model = Model("MixtralForCausalLM", 24, tmp_path)
    each, again = tmp_path / "each", tmp_path / "again"
    lt.convert(model.adapter("a"), base=model.base, names_of="4", output=each)
    lt.convert(each, base=model.base, names_of="4", output=again)
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (each, again)]
    assert configs[0]["target_modules"] == configs[1]["target_modules"]
    assert not configs[1]["target_parameters"]


@pytest.mark.parametrize("name", ["Qwen3_5Moe", "Kimi_K25", "Qwen3VLMoe", "Llama4"])
def test_experts_of_a_model_of_several_parts_go_to_mlx_and_back(name, tmp_path):
    model = Model(f"{name}ForConditionalGeneration", 24, tmp_path)
    adapter = model.adapter("a")
    lt.convert(adapter, to="mlx", base=model.base, output=tmp_path / "mlx")
    wanted = model.change(adapter)
    assert off(model.fused(tmp_path / "mlx"), wanted) <= ROUNDING
    lt.convert(tmp_path / "mlx", to="peft", base=model.base, output=tmp_path / "back")
    assert off(model.change(tmp_path / "back"), wanted) <= 2.0**-20
    if name not in ("Qwen3VLMoe", "Llama4"):  # of whose configuration mlx-lm wants more
        utils = pytest.importorskip("mlx_lm.utils")
        tuner = pytest.importorskip("mlx_lm.tuner.utils")
        loaded, _ = utils.load_model(model.base, strict=False)
        tuner.load_adapters(loaded, str(tmp_path / "mlx"))


def test_names_of_4_are_of_layers_and_come_back(tmp_path):
    """A class that has no layer of a name may have had one before."""
    model = Model("AXK1ForCausalLM", 24, tmp_path)
    adapter = model.adapter("a")
    lt.convert(adapter, names_of="4", base=model.base, output=tmp_path / "four")
    config = json.loads((tmp_path / "four" / "adapter_config.json").read_text())
    assert not config.get("target_parameters")
    wanted = model.change(adapter)
    lt.merge([adapter, tmp_path / "four"], base=model.base, output=tmp_path / "both")
    assert off(model.change(tmp_path / "both"), wanted, wanted) <= 2.0**-48
