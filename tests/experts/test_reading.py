"""Every layout of experts is read as one change, by every command that computes with ΔW."""

import json

import numpy as np
import pytest
from expert_files import (
    APART,
    LAYOUTS,
    OWNER,
    PREFIX,
    SHARED,
    Change,
    base,
    fused_deltas,
    largest_error,
    pair,
    read_deltas,
    save,
    stacked,
    three_d_apart,
    tinker,
    unsloth,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import loratools as lt
from loratools_formats import read_adapter
from loratools_formats.disk.errors import AdapterError, LoratoolsError

# Neither parameter square, gate_up square, down square.
SIZES = ((8, 6), (8, 4), (8, 8))
ROUNDING = 4 * 8 * 2.0**-23  # a sum of at most 8 products, added to a weight in float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("width", "inner"), SIZES)
def test_a_layout_is_read_as_the_change_it_stores(layout, width, inner, tmp_path):
    change = Change(width=width, inner=inner)
    found = read_deltas(read_adapter(save(tmp_path / "a", LAYOUTS[layout](change))))
    assert largest_error(found, change.deltas()) == 0.0


@pytest.mark.parametrize("layout", APART)
def test_gate_and_up_may_have_factors_of_their_own(layout, tmp_path):
    change = Change(same_a=False)
    found = read_deltas(read_adapter(save(tmp_path / "a", LAYOUTS[layout](change))))
    assert largest_error(found, change.deltas()) == 0.0


@pytest.mark.parametrize("layout", SHARED)
def test_a_factor_of_all_experts_is_each_experts(layout, tmp_path):
    change = Change(shared_outer=True)
    adapter = read_adapter(save(tmp_path / "a", SHARED[layout](change)))
    assert largest_error(read_deltas(adapter), change.deltas()) == 0.0
    assert "share" in adapter.expert_layout.described or layout == "Tinker"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("Tinker", "w2"),
        ("Tinker", "experts.w2"),
        ("Tinker", r"model\.layers\.\d+\.mlp\.experts\.w2"),
        ("3-D, apart", "down_proj"),
        ("3-D, apart", "mlp.experts.down_proj"),
        ("3-D", "mlp.experts.down_proj"),
        ("3-D pairs", "mlp.experts.down_proj"),
        ("one by one", r".*\.experts\.\d+\.down_proj"),
        ("one by one, w1 w3 w2", "w2"),
    ],
)
def test_an_alpha_of_its_own_is_found_by_the_names_of_the_file(layout, key, rslora, tmp_path):
    change = Change(rslora=rslora)
    tensors, config = LAYOUTS[layout](change)
    config = {**config, "alpha_pattern": {key: 4 * change.alpha}}
    adapter = read_adapter(save(tmp_path / "a", (tensors, config)))
    wanted = {k: d * 4 if k[0] == "down" else d for k, d in change.deltas().items()}
    assert largest_error(read_deltas(adapter), wanted) <= 2.0**-51


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    layout=st.sampled_from([*LAYOUTS, "mixed"]),
    experts=st.integers(2, 5),
    rank=st.integers(1, 4),
    width=st.integers(1, 9),
    inner=st.integers(1, 9),
    rslora=st.booleans(),
    alpha=st.sampled_from([1.0, 16.0, 3.0, 0.7]),
)
def test_any_size(tmp_path_factory, layout, experts, rank, width, inner, rslora, alpha):
    sizes = {"experts": experts, "rank": rank, "width": width, "inner": inner}
    change = Change(**sizes, rslora=rslora, alpha=alpha, shared_outer=layout == "mixed")
    make = SHARED["mixed"] if layout == "mixed" else LAYOUTS[layout]
    found = read_deltas(read_adapter(save(tmp_path_factory.mktemp("x") / "a", make(change))))
    # numpy may multiply a stack in another order than one matrix
    assert largest_error(found, change.deltas()) <= 8 * 2.0**-52 * rank


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
@pytest.mark.parametrize("stacks", [False, True])
def test_fuse_adds_the_change_to_either_base(layout, stacks, tmp_path):
    change = Change(width=8, inner=8, shared_outer=layout == "mixed")
    make = SHARED["mixed"] if layout == "mixed" else LAYOUTS[layout]
    folder = save(tmp_path / "a", make(change))
    model = base(tmp_path / "base", change, stacks=stacks)
    lt.fuse(model, [folder], output=tmp_path / "fused")
    found = fused_deltas(model, tmp_path / "fused")
    assert largest_error(found, change.deltas()) <= ROUNDING


@pytest.mark.parametrize("layout", [*LAYOUTS, "mixed"])
def test_squeeze_at_full_rank_keeps_the_change(layout, tmp_path):
    change = Change(shared_outer=layout == "mixed")
    make = SHARED["mixed"] if layout == "mixed" else LAYOUTS[layout]
    folder = save(tmp_path / "a", make(change))
    lt.squeeze(folder, rank=2, output=tmp_path / "b")
    found = read_deltas(read_adapter(tmp_path / "b"))
    assert largest_error(found, change.deltas()) <= ROUNDING


def test_info_says_the_layout_and_the_true_shape(tmp_path):
    change = Change()
    swapped = lt.info(save(tmp_path / "a", LAYOUTS["PEFT 0.18"](change)))
    assert "A on the outputs (the shapes of both parameters tell)" in swapped.expert_layout
    assert {module.shape for module in swapped.modules} == {(12, 8), (8, 6)}
    grouped = lt.info(save(tmp_path / "b", LAYOUTS["Unsloth, grouped"](change)))
    assert "lora_B expert by expert (a marker" in grouped.expert_layout
    assert "experts-grouped" in {finding.code for finding in grouped.findings}
    assert "Tinker" in lt.info(save(tmp_path / "c", tinker(change))).expert_layout
    each = lt.info(save(tmp_path / "d", LAYOUTS["one by one"](change)))
    assert each.expert_layout.startswith("experts one by one")


def test_a_marker_against_the_values_warns(tmp_path):
    """Columns of one expert that are nearly parallel show which are one expert's."""
    change = Change(experts=6, rank=4, width=32, inner=16)
    rng = np.random.default_rng(0)
    for name, values in change.b.items():
        noise = 0.2 * rng.normal(size=values.shape)
        change.b[name] = (values[:, :, :1] + noise).astype(np.float32)
    right = read_adapter(save(tmp_path / "right", unsloth(change, "rank_major")))
    assert "expert-order-doubtful" not in {f.code for f in right.findings}
    tensors, _ = unsloth(change, "grouped_by_expert")
    _, config = unsloth(change, "rank_major")
    wrong = read_adapter(save(tmp_path / "wrong", (tensors, config)))
    (found,) = [f for f in wrong.findings if f.code == "expert-order-doubtful"][:1]
    assert "look grouped_by_expert" in found.message
    assert "lora_B_layout=grouped_by_expert" in found.hint


def test_a_marker_of_another_number_of_experts_is_refused(tmp_path):
    change = Change(experts=4)
    tensors, config = unsloth(change, "rank_major")
    for own in config["unsloth_fused_expert_lora"]["parameters"].values():
        own["num_experts"] = 2
    with pytest.raises(AdapterError, match="different numbers of experts"):
        read_adapter(save(tmp_path / "a", (tensors, config)))


def _without(tensors, part):
    return {name: values for name, values in tensors.items() if part not in name}


FAULTS = {
    "lacks one of its two factors": lambda t: _without(t, "gate_proj.lora_B"),
    "different numbers of experts": lambda t: {
        **t, f"{PREFIX}.up_proj.lora_B.weight": np.ones((2, 6, 2), np.float32)},
    "share both factors of a projection": lambda t: {
        **t, **pair(f"{PREFIX}.up_proj", np.ones((1, 2, 8)), np.ones((1, 6, 2)))},
    "rank in the file and rank in the config differ": lambda t: {
        **t, **pair(f"{PREFIX}.up_proj", np.ones((3, 5, 8)), np.ones((3, 6, 5)))},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_stacks_that_do_not_fit_together_are_refused(fault, tmp_path):
    tensors, config = three_d_apart(Change())
    with pytest.raises(LoratoolsError, match=fault):
        read_adapter(save(tmp_path / "a", (FAULTS[fault](tensors), config)))


@pytest.mark.parametrize("turned", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("inner", [3, 6])
def test_one_parameter_turned_and_the_other_not_is_refused(turned, inner, tmp_path):
    """No program writes it, and one of the two would be read the wrong way round."""
    change = Change(width=8, inner=inner)
    (tensors, config), (other, _) = stacked(change), stacked(change, swapped=True)
    for name in tensors:
        if (".base_layer." in name) == (turned == "gate_up_proj"):
            tensors[name] = other[name]
    with pytest.raises(AdapterError, match="its inputs where the other has its outputs"):
        read_adapter(save(tmp_path / "a", (tensors, config)))


def test_without_a_gate_tinkers_first_stack_is_up(tmp_path):
    change = Change()
    tensors, config = tinker(change)
    tensors = _without(tensors, ".w3.")
    tensors |= {f"{PREFIX}.w3.lora_{x}.weight": np.zeros(0, np.float32) for x in "AB"}
    found = read_deltas(read_adapter(save(tmp_path / "a", (tensors, config))))
    wanted = change.deltas()
    assert {name for name, _ in found} == {"up", "down"}
    for e in range(change.experts):
        np.testing.assert_array_equal(found["up", e], wanted["gate", e])


def test_tinkers_other_names_are_the_models(tmp_path):
    change = Change()
    tensors, config = tinker(change)
    for name, out in (("model.unembed_tokens", 16), ("model.layers.0.attn.q_proj", 8)):
        a, b = np.ones((2, 8), np.float32), np.ones((out, 2), np.float32)
        tensors |= pair(f"base_model.model.{name}", a, b)
    adapter = read_adapter(save(tmp_path / "a", (tensors, config)))
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= set(adapter.modules)
    model = base(tmp_path / "base", change, stacks=True)
    result = lt.fuse(model, [tmp_path / "a"], output=tmp_path / "fused")
    assert "lm_head.weight" in json.dumps(result.to_dict())


def test_the_order_can_be_overruled(tmp_path):
    """Marked one way and stored the other, a file is read right once that is said."""
    change = Change()
    tensors, _ = unsloth(change, "grouped_by_expert")
    _, config = unsloth(change, "rank_major")
    folder = save(tmp_path / "a", (tensors, config))
    assert largest_error(read_deltas(read_adapter(folder)), change.deltas()) > 0.1
    lt.convert(folder, to="peft", set={"lora_B_layout": "grouped_by_expert"},
               output=tmp_path / "b")  # fmt: skip
    written = read_adapter(tmp_path / "b")
    assert largest_error(read_deltas(written), change.deltas()) == 0.0
    assert written.config["lora_B_layout"] == "rank_major"


def test_what_plain_peft_wrote_stays_as_it_is(tmp_path):
    folder = save(tmp_path / "a", stacked(Change(), peft_version="0.21.2"))
    lt.convert(folder, to="peft", output=tmp_path / "b")
    for name in ("adapter_model.safetensors",):
        from safetensors.numpy import load_file

        old, new = load_file(folder / name), load_file(tmp_path / "b" / name)
        assert old.keys() == new.keys()
        assert all(np.array_equal(old[key], new[key]) for key in old)


def test_experts_of_gpt_oss_go_to_every_other_output(tmp_path):
    """Stored (E, in, out), gate and up alternating; adapters of single experts have them apart."""
    from expert_files import each, each_joined

    change = Change(width=8, inner=8)
    plain = base(tmp_path / "plain", change, stacks=True)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(plain / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key]:
        whole = tensors[key]
        if "gate_up" in key:
            half = whole.shape[1] // 2
            whole = np.stack([whole[:, :half], whole[:, half:]], 2).reshape(whole.shape)
        tensors[key] = np.ascontiguousarray(whole.transpose(0, 2, 1))
    save_file(tensors, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config |= {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    (plain / "config.json").write_text(json.dumps(config))
    apart = Change(width=8, inner=8, same_a=False)
    rng = np.random.default_rng(3)
    listed, deltas = {}, {}
    for e in range(3):  # as Unsloth's lists have them, outputs alternate as in the base
        for leaf, out in (("gate_up_projs", 16), ("down_projs", 8)):
            a, b = (rng.normal(size=s).astype(np.float32) for s in ((2, 8), (out, 2)))
            listed |= pair(f"{PREFIX}.{leaf}.{e}", a, b)
            d = 2.0 * b.astype(np.float64) @ a
            of = {("gate", e): d[::2], ("up", e): d[1::2]} if out == 16 else {("down", e): d}
            deltas |= of
    listed_config = {**change.config, "target_modules": ["0", "1", "2"]}
    cases = {
        "each": (each(apart), apart.deltas()),
        "joined": (each_joined(change), change.deltas()),
        "listed": ((listed, listed_config), deltas),
        "tinker": (tinker(apart), apart.deltas()),
    }
    for name, (made, wanted) in cases.items():
        folder = save(tmp_path / name, made)
        lt.fuse(plain, [folder], output=tmp_path / f"{name}-fused")
        new = load_file(tmp_path / f"{name}-fused" / "model.safetensors")
        found = {}
        for key, values in tensors.items():
            if ".experts." in key:
                for e, delta in enumerate((new[key] - values).astype(np.float64)):
                    if "gate_up" in key:
                        found |= {("gate", e): delta[:, ::2].T, ("up", e): delta[:, 1::2].T}
                    else:
                        found["down", e] = delta.T
        assert largest_error(found, wanted) <= ROUNDING, name


@pytest.mark.parametrize("stored", ["joined", "apart"])
@pytest.mark.parametrize("inner", [4, 6, 8])
def test_stacks_of_mlx_have_a_on_the_inputs_of_every_base(inner, stored, tmp_path):
    """Transformers stores gpt-oss (E, in, out), MLX (E, out, in), and its down is square."""
    change = Change(inner=inner)
    names = ("gate", "up", "down")
    factors = {}
    for name in names:
        a, b = change.whole(name)
        factors |= {f"{OWNER}.{name}_proj.lora_a": a, f"{OWNER}.{name}_proj.lora_b": b}
    folder = tmp_path / "a"
    folder.mkdir()
    save_file({k: np.ascontiguousarray(v) for k, v in factors.items()},
              folder / "adapters.safetensors")  # fmt: skip
    parameters = {"rank": change.rank, "scale": change.scale, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters})
    )
    size = {name: (3, 8, inner) if name == "down" else (3, inner, 8) for name in names}
    model = tmp_path / "base"
    model.mkdir()
    zeros = {f"{OWNER}.{name}_proj.weight": np.zeros(size[name], np.float32) for name in names}
    if stored == "joined":
        zeros = {
            f"{OWNER}.gate_up_proj": np.zeros((3, 8, 2 * inner), np.float32),
            f"{OWNER}.down_proj": np.zeros((3, inner, 8), np.float32),
        }
    zeros |= {f"{name}.weight": np.zeros((4, 8), np.float32) for name in ("lm_head", "embed")}
    save_file(zeros, model / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    lt.fuse(model, folder, output=tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    if stored == "joined":
        both = fused[f"{OWNER}.gate_up_proj"].transpose(0, 2, 1)
        down = fused[f"{OWNER}.down_proj"].transpose(0, 2, 1)
        found = {"gate": both[:, 0::2], "up": both[:, 1::2], "down": down}
    else:
        found = {name: fused[f"{OWNER}.{name}_proj.weight"] for name in names}
    apart = {(name, e): found[name][e] for name in names for e in range(3)}
    assert largest_error(apart, change.deltas()) <= ROUNDING
