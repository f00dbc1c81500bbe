"""torchtune's own names: attention in its row order and in transformers' must score alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from statedicts import base_of, close, deltas_of, saved

from loratools.algebra.ranks import RankRule
from loratools.cli import cli
from loratools.operations.to_lora import to_lora_choices
from loratools_formats import find_format, read_adapter
from loratools_formats.disk.errors import AdapterError, OptionError, UnsupportedError

RNG = np.random.default_rng(0)
HIDDEN, HEADS, KV_HEADS, WIDTH, RANK, ALPHA = 20, 4, 2, 6, 3, 12
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
SHAPES = {Q: (HEADS * WIDTH, HIDDEN), K: (KV_HEADS * WIDTH, HIDDEN)}
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_size": HIDDEN,
}


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def attention(magnitude=False):
    tensors = {}
    for name, shape in (("q_proj", SHAPES[Q]), ("k_proj", SHAPES[K])):
        tensors[f"layers.0.attn.{name}.lora_a.weight"] = random(RANK, HIDDEN)
        tensors[f"layers.0.attn.{name}.lora_b.weight"] = random(shape[0], RANK)
        if magnitude:
            tensors[f"layers.0.attn.{name}.magnitude"] = np.abs(random(shape[0])) + 1
    return tensors


def plain_change(tensors, name):
    """Return α/r · B @ A of a `LoRALinear`, its rows as they are."""
    a, b = (tensors[f"layers.0.attn.{name}.lora_{side}.weight"].astype("f8") for side in "ab")
    return ALPHA / RANK * b @ a


def in_torchtune_order(weight, heads):
    """Return a weight of transformers' as torchtune loads it (`hf_to_tune`)."""
    return weight.reshape(heads, 2, WIDTH // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def turned_neighbours(x, positions):
    """Return heads (tokens, heads, width) after the rotary embedding of torchtune's Llama."""
    angles = positions[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)


def turned_halves(q, k, positions):
    """Return the same of transformers, by its own function."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = positions[:, None] * 10000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.from_numpy(np.concatenate([angles, angles], -1))[None]
    heads = (torch.from_numpy(x).transpose(0, 1)[None] for x in (q, k))
    return [
        x[0].transpose(0, 1).numpy()
        for x in apply_rotary_pos_emb(*heads, angles.cos(), angles.sin())
    ]


def test_attention_scores_alike_in_both_orders(tmp_path):
    tensors = attention()
    weights = {name: RNG.standard_normal(shape) for name, shape in SHAPES.items()}
    path = saved(tmp_path / "adapter_model.pt", tensors)
    assert find_format(path).name == "torchtune"
    base = base_of(tmp_path / "base", weights, **LLAMA)
    got, _ = deltas_of(path, SHAPES, base=base, alpha=ALPHA)

    x, positions = RNG.standard_normal((5, HIDDEN)), np.arange(5.0)
    native = {
        Q: in_torchtune_order(weights[Q], HEADS) + plain_change(tensors, "q_proj"),
        K: in_torchtune_order(weights[K], KV_HEADS) + plain_change(tensors, "k_proj"),
    }
    q, k = (
        turned_neighbours((x @ native[name].T).reshape(5, -1, WIDTH), positions) for name in (Q, K)
    )
    ours = {name: (x @ (weights[name] + got[name]).T).reshape(5, -1, WIDTH) for name in (Q, K)}
    own_q, own_k = turned_halves(ours[Q], ours[K], positions)

    def scores(q, k):
        return np.einsum("thw,shw->hts", q, np.repeat(k, HEADS // KV_HEADS, axis=1))

    close(scores(own_q, own_k), scores(q, k))
    as_they_are = {name: plain_change(tensors, name.rpartition(".")[2]) for name in SHAPES}
    assert np.linalg.norm(got[Q] - as_they_are[Q]) > 0.5 * np.linalg.norm(got[Q])


def test_rows_stay_where_the_model_turns_halves(tmp_path):
    tensors = attention()
    path = saved(tmp_path / "adapter.safetensors", tensors)
    base = base_of(
        tmp_path / "base",
        {name: np.zeros(shape) for name, shape in SHAPES.items()},
        **LLAMA | {"model_type": "qwen2"},
    )
    got, _ = deltas_of(path, SHAPES, base=base, alpha=ALPHA)
    close(got[Q], plain_change(tensors, "q_proj"))


def test_magnitudes_move_with_their_rows(tmp_path):
    tensors = attention(magnitude=True)
    weights = {name: RNG.standard_normal(shape) for name, shape in SHAPES.items()}
    path = saved(tmp_path / "adapter.safetensors", tensors)
    assert find_format(path).name == "torchtune"
    base = base_of(tmp_path / "base", weights, **LLAMA)
    got, result = deltas_of(path, SHAPES, base=base, rule=RankRule(rank=HIDDEN), alpha=ALPHA)
    assert {module.kind for module in result.modules} == {"torchtune"}
    assert to_lora_choices(read_adapter(path), base=base, given={"alpha": str(ALPHA)}) is not None
    for name, heads in ((Q, HEADS), (K, KV_HEADS)):
        short = name.rpartition(".")[2]
        weight = in_torchtune_order(weights[name].astype("f4").astype("f8"), heads)
        whole = weight + plain_change(tensors, short)
        magnitude = tensors[f"layers.0.attn.{short}.magnitude"].astype("f8")
        native = magnitude[:, None] / np.linalg.norm(whole, axis=1, keepdims=True) * whole
        close(in_torchtune_order(weights[name] + got[name], heads), native)


def test_every_module_gets_the_name_that_transformers_has_for_it(tmp_path):
    own = ["attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"]
    names = [f"layers.11.{name}" for name in own] + ["output"]
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_a.weight": random(2, 6), f"{name}.lora_b.weight": random(8, 2)}
    path = saved(tmp_path / "adapter_0.safetensors", tensors)
    config = {"r": 2, "lora_alpha": 8, "target_modules": ["v_proj"], "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    layer = "model.layers.11"
    order = [
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
        "mlp.up_proj",
    ]
    targets = [f"{layer}.{name}" for name in order] + ["lm_head"]
    got, _ = deltas_of(path, dict.fromkeys(targets, (8, 6)))
    for name, target in zip(names, targets, strict=True):
        b, a = tensors[f"{name}.lora_b.weight"], tensors[f"{name}.lora_a.weight"]
        close(got[target], 4.0 * b.astype("f8") @ a)


def test_what_the_file_does_not_hold_is_asked_for(tmp_path):
    path = saved(tmp_path / "adapter.safetensors", attention())
    given = {"alpha": ALPHA}
    for setting, value in (
        ("rope", "interleaved"),
        ("num_key_value_heads", KV_HEADS),
        ("num_attention_heads", HEADS),
    ):
        with pytest.raises(UnsupportedError, match=f"--set {setting}=VALUE.*or with `base`"):
            deltas_of(path, SHAPES, **given)
        given[setting] = value
    asked, _ = deltas_of(path, SHAPES, **given)
    base = base_of(tmp_path / "base", {n: np.zeros(s) for n, s in SHAPES.items()}, **LLAMA)
    found, _ = deltas_of(path, SHAPES, base=base, alpha=ALPHA)
    np.testing.assert_array_equal(asked[Q], found[Q])
    for wrong in ("0", "2.5", "-4"):
        with pytest.raises(OptionError, match="num_attention_heads"):
            deltas_of(path, SHAPES, **given | {"num_attention_heads": wrong})
    with pytest.raises(AdapterError, match="heads of even width"):
        deltas_of(path, SHAPES, **given | {"num_attention_heads": 8})


def test_a_configuration_of_something_else_is_not_taken(tmp_path):
    path = saved(tmp_path / "adapter.safetensors", attention())
    for config in ({"r": 8, "lora_alpha": 8}, {"r": RANK, "lora_alpha": 8, "use_rslora": True}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(AdapterError, match="not theirs"):
            read_adapter(path)


@pytest.mark.parametrize(
    "extra",
    [
        {"layers.0.attn.q_proj.weight": random(24, 20)},
        {"decoder.layers.0.attn.q_proj.lora_a.weight": random(3, 20)},
        {"layers.0.mlp.w1.lora_a.weight": random(3, 20)},
        {"layers.0.mlp.experts.lora_gate_a": random(3, 20)},
    ],
)
def test_other_tensors_are_refused(tmp_path, extra):
    path = saved(tmp_path / "adapter.safetensors", attention() | extra)
    with pytest.raises(AdapterError):
        read_adapter(path)


def test_fusing_takes_heads_from_the_model(tmp_path):
    tensors = attention(magnitude=True)
    weights = {name: random(*shape) for name, shape in SHAPES.items()}
    base_of(tmp_path / "base", weights, **LLAMA)
    config = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = saved(tmp_path / "adapter_model.pt", tensors)
    arguments = ["fuse", tmp_path / "base", path, "-o", tmp_path / "fused"]
    done = CliRunner().invoke(cli, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    for name, heads in ((Q, HEADS), (K, KV_HEADS)):
        short = name.rpartition(".")[2]
        whole = in_torchtune_order(weights[name].astype("f8"), heads)
        whole += plain_change(tensors, short)
        magnitude = tensors[f"layers.0.attn.{short}.magnitude"].astype("f8")
        native = magnitude[:, None] / np.linalg.norm(whole, axis=1, keepdims=True) * whole
        close(in_torchtune_order(fused[f"{name}.weight"], heads), native)


def test_the_command_line_takes_heads_from_the_base(tmp_path):
    path = saved(tmp_path / "adapter.safetensors", attention())
    base_of(tmp_path / "base", {n: np.zeros(s) for n, s in SHAPES.items()}, **LLAMA)
    arguments = ["to-lora", path, "-o", tmp_path / "out", "--base", tmp_path / "base"]
    done = CliRunner().invoke(cli, [*map(str, arguments), "--set", "alpha=12"])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [K, Q]


def test_phi3_is_fused_into_the_projections_that_transformers_joins(tmp_path):
    width, kv, mlp = HEADS * WIDTH, KV_HEADS * WIDTH, 9
    outs = {
        "attn.q_proj": width,
        "attn.k_proj": kv,
        "attn.v_proj": kv,
        "mlp.w1": mlp,
        "mlp.w3": mlp,
    }
    tensors, deltas = {}, {}
    for name, out in outs.items():
        a, b = random(RANK, HIDDEN), random(out, RANK)
        tensors |= {f"layers.0.{name}.lora_a.weight": a, f"layers.0.{name}.lora_b.weight": b}
        deltas[name] = ALPHA / RANK * b.astype("f8") @ a
    path = saved(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    path = path.rename(tmp_path / "tuned.safetensors")
    weights = {
        "model.layers.0.self_attn.qkv_proj": random(width + 2 * kv, HIDDEN),
        "model.layers.0.mlp.gate_up_proj": random(2 * mlp, HIDDEN),
    }
    base_of(tmp_path / "base", weights, **LLAMA | {"model_type": "phi3"})
    arguments = ["fuse", str(tmp_path / "base"), str(path), "-o", str(tmp_path / "fused")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    after = load_file(tmp_path / "fused" / "model.safetensors")
    # Phi's rotary embedding turns halves, in torchtune as in transformers: rows stay.
    joined = {
        "model.layers.0.self_attn.qkv_proj": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        "model.layers.0.mlp.gate_up_proj": ["mlp.w1", "mlp.w3"],
    }
    for module, names in joined.items():
        want = np.concatenate([deltas[name] for name in names])
        close(after[f"{module}.weight"] - weights[module], want, 1e-5)
    arguments = [
        "to-lora",
        str(path),
        "--base",
        str(tmp_path / "base"),
        "-o",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "in one tensor with others" in done.output
    assert set(read_adapter(tmp_path / "out").modules) == {
        f"model.layers.0.{name}"
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
            "mlp.up_proj",
        )
    }  # fmt: skip
