"""Every layout of experts written from every other, and read again as the same change."""

import json

import numpy as np
import pytest
from expert_files import (
    APART,
    LAYOUTS,
    PREFIX,
    SHARED,
    Change,
    base,
    each,
    largest_error,
    pair,
    read_deltas,
    save,
    stacked,
    three_d_apart,
    tinker,
)
from safetensors.numpy import load_file

import loratools as lt
from loratools_formats import read_adapter
from loratools_formats.disk.errors import LoratoolsError, OptionError, UnsupportedError

TARGETS = {
    "stacked": {"experts": "stacked"},
    "each": {"experts": "each"},
    "3d": {"experts": "3d"},
    "0.18": {"experts": "stacked", "peft_layout": "0.18"},
    "0.19.1": {"experts": "stacked", "peft_layout": "0.19.1"},
    "tinker": {"to": "tinker"},
}


def keys(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("width", "inner"), [(8, 6), (8, 4), (8, 8)])
def test_every_layout_to_every_layout_bit_for_bit(layout, target, width, inner, tmp_path):
    change = Change(width=width, inner=inner)
    model = base(tmp_path / "base", change, stacks=True)
    folder = save(tmp_path / "a", LAYOUTS[layout](change))
    lt.convert(folder, base=model, output=tmp_path / "b", **TARGETS[target])
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0


@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize("target", ["stacked", "each", "3d", "shared-outer", "tinker"])
def test_shared_outer_files_keep_what_they_share(layout, target, tmp_path):
    change = Change(shared_outer=True)
    folder = save(tmp_path / "a", SHARED[layout](change))
    model = base(tmp_path / "base", change, stacks=True)
    asked = {"to": "tinker"} if target == "tinker" else {"experts": target}
    lt.convert(folder, base=model, output=tmp_path / "b", **asked)
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0
    if target in ("shared-outer", "tinker"):
        inner = {"shared-outer": "down_proj", "tinker": "w2"}[target]
        assert keys(tmp_path / "b")[f"{PREFIX}.{inner}.lora_B.weight"].shape == (1, 8, 2)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in APART])
def test_what_is_not_shared_is_refused_with_the_exact_alternative(layout, tmp_path):
    change = Change()
    folder = save(tmp_path / "a", LAYOUTS[layout](change))
    model = base(tmp_path / "base", change, stacks=True)
    with pytest.raises(UnsupportedError, match="do not share") as told:
        lt.convert(folder, base=model, experts="shared-outer", output=tmp_path / "b")
    assert "`experts=3d` or `experts=each` is exact" in str(told.value.hint)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layout", APART)
def test_gate_and_up_of_their_own_double_the_rank(layout, rslora, tmp_path):
    change = Change(same_a=False, rslora=rslora)
    folder = save(tmp_path / "a", LAYOUTS[layout](change))
    model = base(tmp_path / "base", change, stacks=True)
    result = lt.convert(folder, base=model, experts="stacked", output=tmp_path / "b")
    adapter = read_adapter(tmp_path / "b")
    assert largest_error(read_deltas(adapter), change.deltas()) <= 2.0**-51
    ranks = {path.endswith("base_layer"): c.rank for path, c in adapter.modules.items()}
    assert ranks == {True: 4, False: 2}
    assert "rank 4 instead of 2" in " ".join(finding.message for finding in result.findings)
    stored = keys(tmp_path / "b")[f"{PREFIX}.base_layer.lora_B.weight"]
    assert (stored == 0).mean() == 0.5


def test_ranks_scales_and_missing_experts(tmp_path):
    """Zeros for what is missing, scales folded: exact for powers of two."""
    change = Change()
    tensors, config = each(change)
    wanted = change.deltas()
    short = f"{PREFIX}.1.down_proj"
    tensors[f"{short}.lora_A.weight"] = tensors[f"{short}.lora_A.weight"][:1]
    tensors[f"{short}.lora_B.weight"] = tensors[f"{short}.lora_B.weight"][:, :1]
    a, b = (tensors[f"{short}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    config["rank_pattern"] = {"experts.1.down_proj": 1}
    wanted["down", 1] = change.alpha * b @ a  # alpha / 1
    for part in "AB":
        for leaf in ("gate_proj", "up_proj"):
            del tensors[f"{PREFIX}.2.{leaf}.lora_{part}.weight"]
    for name in ("gate", "up"):
        wanted[name, 2] = np.zeros_like(wanted[name, 2])
    folder = save(tmp_path / "a", (tensors, config))
    model = base(tmp_path / "base", change, stacks=True)
    lt.convert(folder, base=model, experts="stacked", output=tmp_path / "b")
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), wanted) == 0.0
    for index, asked in enumerate(({"experts": "3d"}, {"to": "tinker"})):
        lt.convert(folder, base=model, output=tmp_path / str(index), **asked)
        assert largest_error(read_deltas(read_adapter(tmp_path / str(index))), wanted) == 0.0
    with pytest.raises(UnsupportedError, match="an expert is missing"):
        lt.convert(folder, experts="3d", output=tmp_path / "c")


def test_up_alone_needs_the_model_that_may_have_a_gate(tmp_path):
    change = Change()
    tensors, config = each(change)
    tensors = {name: values for name, values in tensors.items() if ".up_proj." in name}
    folder = save(tmp_path / "a", (tensors, {**config, "target_modules": ["up_proj"]}))
    with pytest.raises(UnsupportedError, match="have a gate") as told:
        lt.convert(folder, experts="stacked", output=tmp_path / "no")
    assert "--base BASE" in told.value.hint
    model = base(tmp_path / "base", change, stacks=False)
    lt.convert(folder, base=model, experts="stacked", output=tmp_path / "b")
    found = read_deltas(read_adapter(tmp_path / "b"))
    wanted = change.deltas()
    for e in range(change.experts):
        np.testing.assert_array_equal(found["up", e], wanted["up", e])
        assert not found["gate", e].any()
    lt.convert(folder, base=model, for_="vllm", output=tmp_path / "vllm")
    stored = read_adapter(tmp_path / "vllm").modules
    assert {name.rpartition(".")[2] for name in stored} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(("leaf", "alpha"), [("gate_up_proj", 8.0), ("down_proj", 5.0)])
def test_one_alpha_for_tinker_whatever_patterns_named(leaf, alpha, tmp_path):
    change = Change()
    tensors, config = stacked(change, peft_version="0.21.2", alpha_pattern={leaf: alpha})
    folder = save(tmp_path / "a", (tensors, config))
    wanted = {
        key: delta * alpha / change.alpha if (key[0] == "down") == (leaf == "down_proj") else delta
        for key, delta in change.deltas().items()
    }
    model = base(tmp_path / "base", change, stacks=True)
    lt.convert(folder, base=model, to="tinker", output=tmp_path / "b")
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), wanted) <= 2.0**-22


def test_the_base_is_asked_for_only_where_it_must_tell(tmp_path):
    """Experts as wide as the model may be gpt-oss's, which joins gate and up by turns."""
    wide = Change(width=8, inner=8)
    folder = save(tmp_path / "wide", stacked(wide, peft_version="0.21.2"))
    with pytest.raises(UnsupportedError, match="halves or alternating") as told:
        lt.convert(folder, experts="each", output=tmp_path / "no")
    assert "--base BASE" in str(told.value.hint)
    narrow = Change()
    tensors, config = stacked(narrow, peft_version="0.21.2")
    config["base_model_name_or_path"] = "Qwen/Qwen3-30B-A3B"
    result = lt.convert(
        save(tmp_path / "narrow", (tensors, config)), experts="each", output=tmp_path / "each"
    )
    assert "expert-halves-assumed" in {finding.code for finding in result.findings}
    assert largest_error(read_deltas(read_adapter(tmp_path / "each")), narrow.deltas()) == 0.0
    lt.convert(save(tmp_path / "x", stacked(wide)), experts="3d", output=tmp_path / "3d")
    assert largest_error(read_deltas(read_adapter(tmp_path / "3d")), wide.deltas()) == 0.0


@pytest.mark.parametrize("name", [None, "out/merged", "acme/tiny-moe", "Qwen3-30B-gpt-oss-distill"])
@pytest.mark.parametrize("layout", ["stacked", "each"])
def test_sizes_do_not_tell_how_gate_and_up_are_joined(name, layout, tmp_path):
    """A small model of gpt-oss's class has experts of any width, and joins the two by turns."""
    write = {"stacked": each, "each": stacked}[layout]
    tensors, config = write(Change())
    config["base_model_name_or_path"] = name
    folder = save(tmp_path / "a", (tensors, config))
    with pytest.raises(UnsupportedError, match="halves or alternating") as told:
        lt.convert(folder, experts=layout, output=tmp_path / "b")
    assert "--base BASE" in str(told.value.hint)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "trl-internal-testing/tiny-gptoss"])
def test_a_base_named_gpt_oss_joins_by_turns(name, tmp_path):
    change = Change()
    tensors, config = stacked(change)
    config["base_model_name_or_path"] = name
    lt.convert(save(tmp_path / "a", (tensors, config)), experts="each", output=tmp_path / "b")
    found, wanted = read_deltas(read_adapter(tmp_path / "b")), change.deltas()
    both = np.concatenate([wanted["gate", 1], wanted["up", 1]])
    np.testing.assert_array_equal(found["gate", 1], both[0::2])
    np.testing.assert_array_equal(found["up", 1], both[1::2])


@pytest.mark.parametrize("asked", [{"experts": "stacked"}, {"experts": "3d"}, {"to": "tinker"}])
@pytest.mark.parametrize("how", ["another layer has more", "chosen by a pattern", "by full names"])
def test_the_last_expert_that_is_adapted_may_not_be_the_last_of_the_model(how, asked, tmp_path):
    tensors, config = each(Change())
    config["base_model_name_or_path"] = "Qwen/Qwen3-30B-A3B"
    if how == "another layer has more":
        some = {k: v for k, v in tensors.items() if ".2." not in k.partition("experts")[2]}
        tensors |= {name.replace("layers.0.", "layers.1."): v for name, v in some.items()}
    elif how == "chosen by a pattern":
        config["target_modules"] = r".*\.experts\.[012]\.(gate|up|down)_proj"
    else:
        config["target_modules"] = sorted(
            {k.removeprefix("base_model.model.").partition(".lora_")[0] for k in tensors}
        )
    folder = save(tmp_path / "a", (tensors, config))
    with pytest.raises(UnsupportedError, match="the number of experts in the layer") as told:
        lt.convert(folder, output=tmp_path / "b", **asked)
    assert "--base BASE" in str(told.value.hint)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "0.18"])
@pytest.mark.parametrize("kept", ["gate", "up", "down", "gate down", "up down", "gate up"])
def test_some_projections_alone(kept, target, tmp_path):
    change = Change()
    tensors, config = each(change, [(name, f"{name}_proj") for name in kept.split()])
    folder = save(tmp_path / "a", (tensors, config))
    model = base(tmp_path / "base", change, stacks=True)
    lt.convert(folder, base=model, output=tmp_path / "b", **TARGETS[target])
    found = read_deltas(read_adapter(tmp_path / "b"))
    wanted = {k: d if k[0] in kept.split() else 0 * d for k, d in change.deltas().items()}
    for key, delta in wanted.items():
        np.testing.assert_array_equal(found.get(key, 0 * delta), delta)


@pytest.mark.parametrize(
    "asked",
    [{"experts": x} for x in ("stacked", "each", "3d")]
    + [{"to": "tinker"}, {"for_": "vllm"}, {"for_": "sglang"}],
)
def test_gguf_in_every_layout(asked, tmp_path):
    """Names of GGUF are those of no module; attention goes along."""
    change = Change()
    model = base(tmp_path / "base", change, stacks=False, head_dim=4)
    tensors, config = each(change)
    attention = "base_model.model.model.layers.0.self_attn.o_proj"
    tensors |= pair(attention, np.ones((2, 8), np.float32), np.ones((8, 2), np.float32))
    config["target_modules"].append("o_proj")
    folder = save(tmp_path / "a", (tensors, config))
    lt.convert(folder, base=model, to="gguf", output=tmp_path / "a.gguf")
    lt.convert(tmp_path / "a.gguf", base=model, output=tmp_path / "b", **{"to": "peft"} | asked)
    assert f"{attention}.lora_A.weight" in keys(tmp_path / "b")
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0
    if "vllm" in asked.values():
        assert f"{PREFIX}.0.gate_proj.lora_A.weight" in keys(tmp_path / "b")


@pytest.mark.parametrize("same_a", [False, True])
@pytest.mark.parametrize("stacks", [False, True])
def test_single_experts_of_gguf_have_the_rank_of_the_file(same_a, stacks, tmp_path):
    """Gate and up have stacks of their own there, and need no joined one on the way."""
    change = Change(same_a=same_a)
    model = base(tmp_path / "base", change, stacks=stacks, head_dim=4)
    folder = save(tmp_path / "a", each(change))
    lt.convert(folder, base=model, to="gguf", output=tmp_path / "a.gguf")
    lt.convert(tmp_path / "a.gguf", base=model, to="peft", experts="each", output=tmp_path / "b")
    before, after = keys(folder), keys(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(before[key].shape == after[key].shape for key in before)
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0


PROGRAMS = {
    ("vllm", "qwen3_moe"): f"{PREFIX}.0.gate_proj.lora_A.weight",
    ("vllm", "qwen3_5_moe"): f"{PREFIX}.base_layer.lora_A.weight",
    ("peft", "qwen3_moe"): f"{PREFIX}.base_layer.lora_A.weight",
    ("unsloth", "qwen3_moe"): f"{PREFIX}.base_layer.lora_A.weight",
    ("sglang", "qwen3_moe"): f"{PREFIX}.0.gate_proj.lora_A.weight",
}


@pytest.mark.parametrize(("program", "model_type"), PROGRAMS)
@pytest.mark.parametrize("layout", ["PEFT 0.18", "one by one", "Tinker", "Megatron-Bridge"])
def test_a_program_gets_the_layout_that_it_reads(program, model_type, layout, tmp_path):
    change = Change()
    folder = save(tmp_path / "a", LAYOUTS[layout](change))
    model = base(tmp_path / "base", change, stacks=True, model_type=model_type)
    lt.convert(folder, base=model, for_=program, output=tmp_path / "b")
    assert PROGRAMS[program, model_type] in keys(tmp_path / "b")
    assert largest_error(read_deltas(read_adapter(tmp_path / "b")), change.deltas()) == 0.0
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config.get("lora_B_layout") == "rank_major") >= (program == "unsloth")


def test_vllm_gets_every_projection(tmp_path):
    tensors, config = each(Change(), (("gate", "gate_proj"),))
    model = base(tmp_path / "base", Change(), stacks=True)
    lt.convert(save(tmp_path / "a", (tensors, config)), base=model, for_="vllm",
               output=tmp_path / "b")  # fmt: skip
    stored = keys(tmp_path / "b")
    assert stored[f"{PREFIX}.2.down_proj.lora_B.weight"].shape == (8, 2)
    assert not stored[f"{PREFIX}.2.down_proj.lora_B.weight"].any()
    assert not stored[f"{PREFIX}.0.up_proj.lora_A.weight"].any()


def test_sglang_gets_one_rank_and_one_scale(tmp_path):
    change = Change()
    tensors, config = stacked(change)
    tensors |= pair("base_model.model.model.layers.0.self_attn.q_proj",
                    np.ones((1, 8), np.float32), np.ones((8, 1), np.float32))  # fmt: skip
    config |= {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 1},
               "target_modules": ["q_proj"]}  # fmt: skip
    model = base(tmp_path / "base", change, stacks=True)
    lt.convert(save(tmp_path / "a", (tensors, config)), base=model, for_="sglang",
               output=tmp_path / "b")  # fmt: skip
    adapter = read_adapter(tmp_path / "b")
    assert {c.rank for c in adapter.modules.values()} == {2}
    assert len({c.require_factors().scale for c in adapter.modules.values()}) == 1
    assert not adapter.config.get("rank_pattern")
    part = adapter.modules["model.layers.0.self_attn.q_proj"].require_factors()
    np.testing.assert_array_equal(part.scale * part.b.load() @ part.a.load(), np.ones((8, 8)))


def test_tinkers_head_goes_both_ways(tmp_path):
    change = Change(shared_outer=True)
    tensors, config = tinker(change)
    tensors |= pair("base_model.model.model.unembed_tokens",
                    np.ones((2, 8), np.float32), np.ones((16, 2), np.float32))  # fmt: skip
    folder = save(tmp_path / "a", (tensors, config))
    lt.convert(folder, to="tinker", output=tmp_path / "b")
    old, new = keys(folder), keys(tmp_path / "b")
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[key], new[key]) for key in old)
    again = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert again["target_modules"] == "all-linear"
    assert (again["r"], again["lora_alpha"]) == (2, 4)


def test_experts_without_a_gate(tmp_path):
    """Nemotron: up and down alone; Tinker then calls up w1 and has an empty w3."""
    change = Change()
    tensors, config = each(change, (("up", "up_proj"), ("down", "down_proj")))
    tensors = {name.replace(".mlp.", ".mixer."): values for name, values in tensors.items()}
    folder = save(tmp_path / "a", (tensors, config))
    wanted = {key: delta for key, delta in change.deltas().items() if key[0] != "gate"}
    for target, asked in TARGETS.items():
        if target == "0.18":
            continue
        lt.convert(folder, output=tmp_path / target, **asked)
        assert largest_error(read_deltas(read_adapter(tmp_path / target)), wanted) == 0.0, target
    stored = keys(tmp_path / "tinker")
    owner = PREFIX.replace(".mlp.", ".mixer.")
    assert stored[f"{owner}.w3.lora_A.weight"].shape == (0,)
    assert f"{owner}.w1.lora_A.weight" in stored


def test_options_that_exclude_each_other(tmp_path):
    folder = save(tmp_path / "a", three_d_apart(Change()))
    with pytest.raises(OptionError, match="leave out `experts`"):
        lt.convert(folder, for_="vllm", experts="each", output=tmp_path / "b")
    with pytest.raises(OptionError, match="no such target"):
        lt.convert(folder, for_="vlm", output=tmp_path / "b")
    with pytest.raises(LoratoolsError):
        lt.convert(folder, for_="mlx", to="peft", output=tmp_path / "b")
    with pytest.raises(OptionError, match="are those of PEFT folders"):
        lt.convert(folder, to="mlx", experts="each", output=tmp_path / "b")


def test_a_mispacked_file_is_written_right_and_told(tmp_path):
    change = Change()
    wanted, _ = stacked(change)
    for layout in ("Megatron-Bridge", "Unsloth, unmarked", "Unsloth, grouped", "PEFT 0.18"):
        folder = save(tmp_path / layout, LAYOUTS[layout](change))
        result = lt.convert(folder, to="peft", output=tmp_path / f"{layout} done")
        new = keys(tmp_path / f"{layout} done")
        assert new.keys() == wanted.keys()
        assert all(np.array_equal(new[key], wanted[key]) for key in wanted), layout
        assert result.findings


def stacks_of(adapter, names):
    """Return ΔW by (projection, expert) of an adapter of MLX or GGUF, and check its modules."""
    found = {}
    for path, change in adapter.modules.items():
        name = next(name for name, part in names.items() if part in path)
        part = change.require_factors()
        delta = part.scale * part.b.load(np.float64) @ part.a.load(np.float64)
        found |= {(name, e): one for e, one in enumerate(delta)}
    return found


@pytest.mark.parametrize("layout", [*sorted(LAYOUTS.keys() - {"one by one, w1 w3 w2"}), "mixed"])
@pytest.mark.parametrize("stacks", [False, True])
def test_to_mlx_and_to_gguf(layout, stacks, tmp_path):
    """Square, so that a wrong side shows in values only."""
    change = Change(width=8, inner=8, shared_outer=layout == "mixed")
    make = SHARED["mixed"] if layout == "mixed" else LAYOUTS[layout]
    folder = save(tmp_path / "a", make(change))
    model = base(tmp_path / "base", change, stacks=stacks)
    lt.convert(folder, base=model, for_="mlx", output=tmp_path / "b-mlx")
    names = {name: f"switch_mlp.{name}_proj" for name in ("gate", "up", "down")}
    found = stacks_of(read_adapter(tmp_path / "b-mlx"), names)
    assert largest_error(found, change.deltas()) == 0.0
    lt.convert(folder, base=model, for_="llamacpp", output=tmp_path / "b.gguf")
    names = {name: f"ffn_{name}_exps" for name in ("gate", "up", "down")}
    found = stacks_of(read_adapter(tmp_path / "b.gguf"), names)
    assert largest_error(found, change.deltas()) == 0.0


@pytest.mark.parametrize("target", ["stacked", "each", "3d", "tinker", "gguf"])
def test_from_mlx(target, tmp_path):
    change = Change(same_a=False)
    model = base(tmp_path / "base", change, stacks=True)
    folder = save(tmp_path / "a", each(change))
    lt.convert(folder, base=model, to="mlx", output=tmp_path / "b-mlx")
    asked = {"to": target} if target in ("tinker", "gguf") else {"experts": target}
    output = tmp_path / ("c.gguf" if target == "gguf" else "c")
    lt.convert(tmp_path / "b-mlx", base=model, output=output, **asked)
    adapter = read_adapter(output)
    if target == "gguf":
        names = {name: f"ffn_{name}_exps" for name in ("gate", "up", "down")}
        found = stacks_of(adapter, names)
    else:
        found = read_deltas(adapter)
    assert largest_error(found, change.deltas()) <= 2.0**-51


def test_mlx_gets_one_rank_and_one_scale(tmp_path):
    change = Change()
    tensors, config = stacked(change)
    tensors |= pair("base_model.model.model.layers.0.self_attn.q_proj",
                    np.ones((1, 8), np.float32), np.ones((8, 1), np.float32))  # fmt: skip
    config |= {"rank_pattern": {"q_proj": 1}, "alpha_pattern": {"q_proj": 1},
               "target_modules": ["q_proj"]}  # fmt: skip
    model = base(tmp_path / "base", change, stacks=True)
    lt.convert(save(tmp_path / "a", (tensors, config)), base=model, to="mlx",
               output=tmp_path / "b-mlx")  # fmt: skip
    adapter = read_adapter(tmp_path / "b-mlx")
    assert {c.rank for c in adapter.modules.values()} == {2}
    part = adapter.modules["model.layers.0.self_attn.q_proj"].require_factors()
    np.testing.assert_array_equal(part.scale * part.b.load() @ part.a.load(), np.ones((8, 8)))
