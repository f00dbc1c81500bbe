"""Megatron's fused projections: what its own layer adds, taken apart as its attention does."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statedicts import base_of, close, deltas_of, saved

from loratools.algebra.ranks import RankRule
from loratools.base.shape_only import ShapeOnly
from loratools.kinds import get_kind
from loratools_formats import find_format, read_adapter
from loratools_formats.core.change import KindDelta
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import AdapterError, UnsupportedError

RNG = np.random.default_rng(0)
HIDDEN, HEADS, GROUPS, WIDTH, MLP, RANK, ALPHA = 20, 6, 2, 4, 9, 3, 12
LAYER = "model.layers.7"
SHAPES = {
    f"{LAYER}.self_attn.q_proj": (HEADS * WIDTH, HIDDEN),
    f"{LAYER}.self_attn.k_proj": (GROUPS * WIDTH, HIDDEN),
    f"{LAYER}.self_attn.v_proj": (GROUPS * WIDTH, HIDDEN),
    f"{LAYER}.self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
    f"{LAYER}.mlp.gate_proj": (MLP, HIDDEN),
    f"{LAYER}.mlp.up_proj": (MLP, HIDDEN),
    f"{LAYER}.mlp.down_proj": (HIDDEN, MLP),
}
LLAMA = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "intermediate_size": MLP,
}
BRIDGE = {
    "qkv": "self_attention.linear_qkv.adapter",
    "proj": "self_attention.linear_proj.adapter",
    "fc1": "mlp.linear_fc1.adapter",
    "fc2": "mlp.linear_fc2.adapter",
}
NEMO_1 = {
    "qkv": "self_attention.adapter_layer.lora_kqv_adapter",
    "proj": "self_attention.adapter_layer.lora_dense_attention_adapter",
    "fc1": "mlp.adapter_layer.lora_hto4h_adapter",
    "fc2": "mlp.adapter_layer.lora_4htoh_adapter",
}
SIDES = {
    "qkv": ((HEADS + 2 * GROUPS) * WIDTH, HIDDEN),
    "proj": (HIDDEN, HEADS * WIDTH),
    "fc1": (2 * MLP, HIDDEN),
    "fc2": (HIDDEN, MLP),
}


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def fused(prefix="decoder.layers.7.", names=BRIDGE, magnitude=False):
    tensors = {}
    for short, (out, in_) in SIDES.items():
        tensors[f"{prefix}{names[short]}.linear_in.weight"] = random(RANK, in_)
        tensors[f"{prefix}{names[short]}.linear_out.weight"] = random(out, RANK)
        if magnitude:
            tensors[f"{prefix}{names[short]}.weight_magnitude"] = np.abs(random(out)) + 1
    return tensors


def added(tensors, x, name):
    """Return what `ParallelLinearAdapter.forward` gives for x (tokens, in)."""
    a, b = (
        next(v.astype("f8") for k, v in tensors.items() if f"{name}.linear_{side}.weight" in k)
        for side in ("in", "out")
    )
    return x @ a.T @ b.T * (ALPHA / RANK)


def taken_apart(mixed):
    """Return q, k and v of `linear_qkv`'s output, as Megatron's `SelfAttention` splits it."""
    of_groups = mixed.reshape(len(mixed), GROUPS, (HEADS // GROUPS + 2) * WIDTH)
    sizes = np.cumsum([HEADS // GROUPS * WIDTH, WIDTH])
    return [part.reshape(len(mixed), -1) for part in np.split(of_groups, sizes, axis=2)]


def outputs(tensors, x, names=BRIDGE):
    """Return what every projection's output gains, by transformers' name."""
    wide = {short: RNG.standard_normal((5, SIDES[short][1])) for short in ("proj", "fc2")}
    gains = {short: added(tensors, wide.get(short, x), names[short]) for short in SIDES}
    q, k, v = taken_apart(gains["qkv"])
    gate, up = np.split(gains["fc1"], 2, axis=1)
    parts = [q, k, v, gains["proj"], gate, up, gains["fc2"]]
    inputs = [x, x, x, wide["proj"], x, x, wide["fc2"]]
    return {name: (i, o) for name, i, o in zip(SHAPES, inputs, parts, strict=True)}


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("decoder.layers.7.", BRIDGE),
        ("module.module.decoder.layers.7.", BRIDGE),
        ("model.language_model.encoder.layers.7.", NEMO_1),
        ("model.decoder.layers.7.", NEMO_1),
    ],
)
def test_fused_adapters_become_the_projections(tmp_path, prefix, names):
    tensors = fused(prefix, names)
    path = saved(tmp_path / "adapter.safetensors", tensors)
    assert find_format(path).name == "megatron"
    got, result = deltas_of(path, SHAPES, alpha=ALPHA, **LLAMA)
    for name, (x, gain) in outputs(tensors, RNG.standard_normal((5, HIDDEN)), names).items():
        close(x @ got[name].T, gain)
        assert result.adapter.modules[name].rank == RANK
    base = base_of(tmp_path / "base", {n: np.zeros(s) for n, s in SHAPES.items()}, **LLAMA)
    again, _ = deltas_of(path, SHAPES, base=base, alpha=ALPHA)
    for name in SHAPES:
        np.testing.assert_array_equal(again[name], got[name])


def test_pickles_are_read_too(tmp_path):
    path = saved(tmp_path / "model_weights.ckpt", fused())
    assert find_format(path).name == "megatron"
    assert set(read_adapter(path).modules) == set(SHAPES)


def archived(path, names, compression="", config=None):
    weights = saved(path.parent / "model_weights.ckpt", fused("model.decoder.layers.7.", NEMO_1))
    with tarfile.open(path, f"w:{compression}") as archive:
        for name in names:
            archive.add(weights, name)
        for content in () if config is None else (config,):
            member = tarfile.TarInfo("./model_config.yaml")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    weights.unlink()
    return path


def test_archives_of_nemo_are_opened(tmp_path):
    path = archived(tmp_path / "lora.nemo", ["./model_weights.ckpt"])
    assert find_format(path).name == "nemo"
    adapter = read_adapter(path)
    assert set(adapter.modules) == set(SHAPES)
    assert adapter.inputs[0].path == path
    got, _ = deltas_of(path, SHAPES, alpha=ALPHA, **LLAMA)
    assert np.linalg.norm(got[f"{LAYER}.mlp.up_proj"]) > 0


@pytest.mark.parametrize(
    ("names", "compression", "message"),
    [
        (["weights.ckpt"], "", "does not have exactly one model_weights"),
        (["tp_rank_00/model_weights.ckpt", "tp_rank_01/model_weights.ckpt"], "", "Merge the ranks"),
        (["model_weights.ckpt"], "gz", "compressed"),
    ],
)
def test_archives_of_another_kind_are_refused(tmp_path, names, compression, message):
    path = archived(tmp_path / "lora.nemo", names, compression)
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)


def nemo_config(**tuning):
    return json.dumps({"peft": {"peft_scheme": "lora", "lora_tuning": tuning}}).encode()


def test_alpha_of_an_archive_is_in_its_configuration(tmp_path):
    config = nemo_config(adapter_dim=RANK, alpha=ALPHA)
    path = archived(tmp_path / "lora.nemo", ["model_weights.ckpt"], config=config)
    assert {
        delta.kind_delta.settings["alpha"] for delta in read_adapter(path).modules.values()
    } == {ALPHA}
    deltas_of(path, SHAPES, **LLAMA)


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"peft: {lora_tuning: {alpha: '${x}'}}",
        b"peft: {lora_tuning: {alpha: .nan}}",
    ],
)
def test_an_alpha_that_is_no_number_is_asked_for(tmp_path, config):
    path = archived(tmp_path / "lora.nemo", ["model_weights.ckpt"], config=config)
    with pytest.raises(UnsupportedError, match="alpha"):
        deltas_of(path, SHAPES, **LLAMA)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (nemo_config(adapter_dim=RANK + 1, alpha=ALPHA), "another rank"),
        (b"a: &a [1]\nb: *a", "aliases"),
        (b"a: !!python/name:os.system x", "tags"),
        (b"peft: 1\npeft: 2", "duplicate"),
        (b"[" * 5000, "YAML"),
        (b"a: " + b"x" * (1 << 20), "at most"),
    ],
)
def test_configurations_that_are_not_sound_are_refused(tmp_path, config, message):
    path = archived(tmp_path / "lora.nemo", ["model_weights.ckpt"], config=config)
    with pytest.raises(AdapterError, match=message):
        read_adapter(path)


def test_sparse_members_are_refused(tmp_path):
    path = tmp_path / "lora.nemo"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        member = tarfile.TarInfo("model_weights.ckpt")
        member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"77777777777\0"  # what it expands to
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        archive.fileobj.write(header)
    with pytest.raises(AdapterError, match="sparse"):
        read_adapter(path, "nemo")


def test_archives_cut_short_are_refused(tmp_path):
    path = archived(tmp_path / "lora.nemo", ["model_weights.ckpt"])
    content = path.read_bytes()
    for share in (0.1, 0.5):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(AdapterError):
            read_adapter(path)


def test_distributed_checkpoints_are_recognised_and_refused(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"")
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    assert find_format(tmp_path).name == "megatron"
    with pytest.raises(UnsupportedError, match=r"torch\.distributed\.checkpoint\.format_utils"):
        read_adapter(tmp_path)
    (tmp_path / "metadata.json").write_bytes(b"{}")
    with pytest.raises(UnsupportedError, match="export_adapter_ckpt"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("bridge", [True, False])
def test_canonical_adapters_are_of_one_projection_each(tmp_path, bridge):
    names = (
        {
            "q_proj": "self_attention.linear_qkv.adapter.adapter_q",
            "up_proj": "mlp.linear_fc1.adapter.adapter_up",
        }
        if bridge
        else {
            "q_proj": "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter",
            "up_proj": "mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter",
        }
    )
    tensors, shapes, want = {}, {}, {}
    for leaf, name in names.items():
        target = next(target for target in SHAPES if target.endswith(leaf))
        shapes[target] = SHAPES[target]
        a, b = random(RANK, HIDDEN), random(SHAPES[target][0], RANK)
        tensors[f"decoder.layers.7.{name}.linear_in.weight"] = a
        tensors[f"decoder.layers.7.{name}.linear_out.weight"] = b
        want[target] = ALPHA / RANK * b.astype("f8") @ a
    got, _ = deltas_of(saved(tmp_path / "adapter.safetensors", tensors), shapes, alpha=ALPHA)
    for target in shapes:
        close(got[target], want[target])


def test_magnitudes_are_taken_apart_like_the_rows(tmp_path):
    tensors = fused(magnitude=True)
    weights = {name: RNG.standard_normal(shape).astype("f4") for name, shape in SHAPES.items()}
    base = base_of(tmp_path / "base", weights, **LLAMA)
    path = saved(tmp_path / "adapter.safetensors", tensors)
    with pytest.raises(UnsupportedError, match="`base`"):
        deltas_of(path, SHAPES, alpha=ALPHA, **LLAMA)
    got, _ = deltas_of(path, SHAPES, base=base, alpha=ALPHA, rule=RankRule(rank=HEADS * WIDTH))
    # DoRALinear: m / ‖W + s·BA‖ · (W + s·BA), over the fused weight.
    name = BRIDGE["qkv"]
    gathered = {leaf: weights[f"{LAYER}.self_attn.{leaf}_proj"] for leaf in "qkv"}
    rows = []
    for group in range(GROUPS):
        per = HEADS // GROUPS * WIDTH
        rows.append(gathered["q"][group * per : (group + 1) * per])
        rows += [gathered[leaf][group * WIDTH : (group + 1) * WIDTH] for leaf in "kv"]
    fused_weight = np.concatenate(rows).astype("f8")
    whole = fused_weight + added(tensors, np.eye(HIDDEN), name).T
    magnitude = tensors[f"decoder.layers.7.{name}.weight_magnitude"].astype("f8")
    whole *= (magnitude / np.linalg.norm(whole, axis=1))[:, None]
    x = RNG.standard_normal((5, HIDDEN))
    for leaf, want in zip("qkv", taken_apart(x @ whole.T), strict=True):
        target = f"{LAYER}.self_attn.{leaf}_proj"
        close(x @ (weights[target] + got[target]).T, want)


def test_what_the_file_does_not_hold_is_asked_for(tmp_path):
    path = saved(tmp_path / "adapter.safetensors", fused())
    given = {"alpha": ALPHA, **LLAMA}
    for setting in given:
        others = {name: value for name, value in given.items() if name != setting}
        with pytest.raises(UnsupportedError, match=f"--set {setting}=VALUE"):
            deltas_of(path, SHAPES, **others)
    with pytest.raises(AdapterError, match="divide into heads"):
        deltas_of(path, SHAPES, **given | {"num_attention_heads": 8})
    with pytest.raises(AdapterError, match="gate above an up"):
        deltas_of(path, SHAPES, **given | {"intermediate_size": 2 * MLP})


@given(groups=st.integers(1, 4), per_group=st.integers(1, 4), width=st.integers(1, 5))
def test_every_fused_row_goes_to_one_projection(groups, per_group, width):
    heads = groups * per_group
    total = (heads + 2 * groups) * width
    rows = np.arange(float(total)).reshape(total, 1)
    settings = {"alpha": 1.0, "num_attention_heads": heads, "num_key_value_heads": groups}
    factors = {"a": in_memory("a", np.ones((1, 1))), "b": in_memory("b", rows)}
    found = []
    for projection, height in (("q", heads), ("k", groups), ("v", groups)):
        delta = KindDelta("megatron", factors, settings | {"projection": projection})
        taken = get_kind("megatron").form(delta, ShapeOnly((0, 0))).b[:, 0]
        assert len(taken) == height * width
        assert (np.diff(taken) > 0).all()
        found.append(taken)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), rows[:, 0])


PREFIX = "decoder.layers.7."


@pytest.mark.parametrize(
    "extra",
    [
        {f"{PREFIX}mlp.linear_fc1.to_wrap.weight": random(18, 20)},
        {f"{PREFIX}mlp.experts.linear_fc1.adapter.linear_in.weight": random(3, 20)},
        {f"module.{PREFIX}mlp.linear_fc1.adapter.linear_in.weight": random(3, 20)},
        {"decoder.layers.8.mlp.linear_fc1.adapter.linear_in.weight": random(3, 20)},
        {
            f"{PREFIX}mlp.linear_fc1.adapter.adapter_up.linear_{s}.weight": random(*shape)
            for s, shape in (("in", (3, 20)), ("out", (9, 3)))
        },
    ],
)
def test_other_tensors_are_refused(tmp_path, extra):
    path = saved(tmp_path / "adapter.safetensors", fused() | extra)
    with pytest.raises(AdapterError):
        read_adapter(path)


EXPERTS, MOE = 3, 5


def experts(shared_outer=False):
    """Return the adapters of experts, and what the projections of each are to gain."""
    prefix = "decoder.layers.7.mlp.experts."
    fc1 = {"in": random(EXPERTS, RANK, HIDDEN), "out": random(EXPERTS, 2 * MOE, RANK)}
    fc2 = {"in": random(EXPERTS, RANK, MOE), "out": random(EXPERTS, HIDDEN, RANK)}
    if shared_outer:
        fc1["in"], fc2["out"] = fc1["in"][0], fc2["out"][0]
    wants = {}
    for i in range(EXPERTS):
        (a1, b1), (a2, b2) = (
            [side[i] if side.ndim == 3 else side for side in (fc["in"], fc["out"])]
            for fc in (fc1, fc2)
        )
        whole = ALPHA / RANK * b1.astype("f8") @ a1
        wants[f"{LAYER}.mlp.experts.{i}.gate_proj"] = whole[:MOE]
        wants[f"{LAYER}.mlp.experts.{i}.up_proj"] = whole[MOE:]
        wants[f"{LAYER}.mlp.experts.{i}.down_proj"] = ALPHA / RANK * b2.astype("f8") @ a2
    tensors = {}
    for name, fc in (("linear_fc1", fc1), ("linear_fc2", fc2)):
        for side, values in fc.items():
            tensors[f"{prefix}{name}.adapter.linear_{side}.weight"] = np.ascontiguousarray(values)
    return tensors, wants


@pytest.mark.parametrize("shared_outer", [False, True])
def test_experts_have_factors_of_their_own(tmp_path, shared_outer):
    tensors, wants = experts(shared_outer)
    path = saved(tmp_path / "adapter.safetensors", tensors)
    assert {tensor.key for tensor in read_adapter(path).tensors()} == set(tensors)
    shapes = {name: want.shape for name, want in wants.items()}
    got, _ = deltas_of(path, shapes, alpha=ALPHA, moe_intermediate_size=MOE)
    for name, want in wants.items():
        close(got[name], want)


def test_experts_are_fused_into_the_stacks_of_transformers(tmp_path):
    from safetensors.numpy import load_file, save_file

    from loratools.operations.fuse.draft import FuseInput
    from loratools.operations.fuse.operation import Fusion
    from loratools.operations.fuse.options import FuseOptions
    from loratools.operations.to_lora import to_lora
    from loratools_formats.checkpoints.checkpoint import read_checkpoint

    tensors, wants = experts()
    path = saved(tmp_path / "adapter.safetensors", tensors)
    base = base_of(tmp_path / "base", {}, model_type="qwen3_moe", moe_intermediate_size=MOE)
    stacks = {
        f"{LAYER}.mlp.experts.gate_up_proj": random(EXPERTS, 2 * MOE, HIDDEN),
        f"{LAYER}.mlp.experts.down_proj": random(EXPERTS, HIDDEN, MOE),
    }
    save_file(stacks, tmp_path / "base" / "model.safetensors")
    base = read_checkpoint(tmp_path / "base")
    plain = to_lora(read_adapter(path), RankRule(), base=base, given={"alpha": str(ALPHA)})
    fusion = Fusion(base, [FuseInput(plain.adapter, 1.0, "lora")], FuseOptions())
    fusion.write(tmp_path / "fused")
    after = load_file(tmp_path / "fused" / "model.safetensors")
    for i in range(EXPERTS):
        gate, up, down = (
            wants[f"{LAYER}.mlp.experts.{i}.{leaf}_proj"] for leaf in ("gate", "up", "down")
        )
        gate_up = f"{LAYER}.mlp.experts.gate_up_proj"
        close(after[gate_up][i] - stacks[gate_up][i], np.concatenate([gate, up]), 1e-5)
        key = f"{LAYER}.mlp.experts.down_proj"
        close(after[key][i] - stacks[key][i], down, 1e-5)


def test_experts_that_share_both_factors_are_refused(tmp_path):
    tensors, _ = experts()
    tensors = {key: values[0] for key, values in tensors.items()}
    with pytest.raises(AdapterError, match="stacked by experts"):
        read_adapter(saved(tmp_path / "adapter.safetensors", tensors))
