"""Changes that go to parts of tensors, or to several: the engine beside a dense fuse.

Where they go is the business of `loratools.base.placement` and proved there; here, that blocks,
spans, planes and transposed layouts come to the same as indexing whole matrices in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import fuse_cases as cases
import numpy as np
import placed_reference
import pytest
import rounding

from loratools.base.placement import place
from loratools.operations.fuse import blocks
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint

L = "model.layers.0"
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}


@dataclass(frozen=True)
class Case:
    """Shapes of a base's tensors, and (out, in) of an adapter's modules."""

    base: dict[str, tuple[int, ...]]
    modules: dict[str, tuple[int, int]]
    config: dict[str, Any]
    adapter: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(
        {f"{L}.mlp.up_proj.weight": (24, 16)}, {f"{L}.mlp.up_proj": (24, 16)}, {}
    ),
    "square Conv1D and not": Case(
        {"h.0.attn.c_attn.weight": (16, 48), "h.0.attn.c_proj.weight": (16, 16)},
        {"h.0.attn.c_attn": (48, 16), "h.0.attn.c_proj": (16, 16)},
        {"model_type": "gpt2", "n_head": 4},
    ),
    "parts of a joined projection": Case(
        {f"{L}.self_attn.qkv_proj.weight": (32, 16), f"{L}.mlp.gate_up_proj.weight": (48, 16)},
        {
            f"{L}.self_attn.q_proj": (16, 16), f"{L}.self_attn.v_proj": (8, 16),
            f"{L}.mlp.up_proj": (24, 16), f"{L}.mlp.gate_proj": (24, 16),
        },
        {"model_type": "phi3", **HEADS},
    ),
    "parts of a grouped projection": Case(
        {"h.0.self_attention.query_key_value.weight": (32, 16)},
        {"h.0.self_attention.query": (16, 16), "h.0.self_attention.key": (8, 16)},
        {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2, **HEADS},
    ),
    "parts of a Conv1D projection": Case(
        {"h.0.attn.c_attn.weight": (16, 48)},
        {"h.0.attn.q_proj": (16, 16), "h.0.attn.v_proj": (16, 16)},
        {"model_type": "gpt2", "n_head": 4},
    ),
    "a joined projection on its parts": Case(
        {
            f"{L}.self_attn.{name}_proj.weight": shape
            for name, shape in (("q", (16, 16)), ("k", (8, 16)), ("v", (8, 16)))
        }
        | {f"{L}.mlp.gate_proj.weight": (24, 16), f"{L}.mlp.up_proj.weight": (24, 16)},
        {f"{L}.self_attn.qkv_proj": (32, 16), f"{L}.mlp.gate_up_proj": (48, 16)},
        HEADS,
    ),
    "experts one by one on a stack": Case(
        {
            f"{L}.mlp.experts.gate_up_proj": (3, 24, 16),
            f"{L}.mlp.experts.down_proj": (3, 16, 12),
        },
        {
            f"{L}.mlp.experts.0.gate_proj": (12, 16), f"{L}.mlp.experts.2.up_proj": (12, 16),
            f"{L}.mlp.experts.2.gate_proj": (12, 16), f"{L}.mlp.experts.1.down_proj": (16, 12),
        },
        {"model_type": "mixtral"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("block", [20, 1 << 17])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_engine_is_the_dense_fuse(tmp_path, monkeypatch, name, dora, block):
    monkeypatch.setattr(blocks, "_BLOCK_ELEMENTS", block)
    case, rng = CASES[name], np.random.default_rng(1)
    base = cases.base(
        tmp_path / "base",
        {key: rng.standard_normal(shape).astype("f4") for key, shape in case.base.items()},
        **case.config,
    )
    modules = {path: cases.factors(rng, *shape, 3) for path, shape in case.modules.items()}
    extra = {
        f"{path}.lora_magnitude_vector": rng.uniform(0.5, 2, out).astype("f4")
        for path, (out, _) in case.modules.items()
    }
    adapter = cases.adapter(
        tmp_path / "adapter", modules, extra if dora else None, use_dora=dora, **case.adapter
    )
    result, after = cases.fused(tmp_path / "out", base, adapter)
    before = cases.tensors(base)
    placements = place(read_adapter(adapter), read_checkpoint(base))
    exact = placed_reference.applied(
        placements, {key: array.astype(np.float64) for key, array in before.items()}
    )
    assert after.keys() == exact.keys()
    reports = {report.key: report for report in result.tensors}
    assert reports.keys() == {p.key for p in placements.deltas}
    for key, array in after.items():
        assert rounding.distances(array, exact[key]).max() == 0, key
        if key in reports:
            change = np.linalg.norm(exact[key] - before[key]) / _norm(before[key])
            assert reports[key].relative_change == pytest.approx(change, rel=1e-9)


@pytest.mark.parametrize("weight", [1.0, -0.7])
def test_biases_of_factors_go_to_their_part(tmp_path, weight):
    rng = np.random.default_rng(2)
    key = f"{L}.self_attn.qkv_proj"
    w, bias = rng.standard_normal((32, 16)).astype("f4"), rng.standard_normal(32).astype("f4")
    base = cases.base(
        tmp_path / "base", {f"{key}.weight": w, f"{key}.bias": bias}, model_type="phi3", **HEADS
    )
    b, a = cases.factors(rng, 8, 16, 4)
    extra = rng.standard_normal(8).astype("f4")
    path = f"{L}.self_attn.k_proj"
    adapter = cases.adapter(
        tmp_path / "adapter", {path: (b, a)}, {f"{path}.lora_B.bias": extra}, lora_bias=True
    )
    _, after = cases.fused(tmp_path / "out", base, (adapter, weight))
    exact = w.astype(np.float64), bias.astype(np.float64)
    exact[0][16:24] += weight * 0.5 * (b.astype(np.float64) @ a)
    exact[1][16:24] += weight * 0.5 * extra.astype(np.float64)
    assert rounding.distances(after[f"{key}.weight"], exact[0]).max() == 0
    assert rounding.distances(after[f"{key}.bias"], exact[1]).max() == 0


def test_parts_of_one_tensor_by_several_adapters(tmp_path):
    """One adapter changes all outputs, one some of them, one these again as a DoRA."""
    rng = np.random.default_rng(3)
    key = f"{L}.mlp.gate_up_proj"
    w = rng.standard_normal((48, 16)).astype("f4")
    base = cases.base(tmp_path / "base", {f"{key}.weight": w}, model_type="phi3", **HEADS)
    whole, part, again = (cases.factors(rng, out, 16, 2) for out in (48, 24, 24))
    magnitude = rng.uniform(0.5, 2, 24).astype("f4")
    adapters = [
        (cases.adapter(tmp_path / "whole", {key: whole}), 0.5),
        (cases.adapter(tmp_path / "part", {f"{L}.mlp.up_proj": part}), -2.0),
        (
            cases.adapter(
                tmp_path / "again",
                {f"{L}.mlp.up_proj": again},
                {f"{L}.mlp.up_proj.lora_magnitude_vector": magnitude},
                use_dora=True,
            ),
            0.3,
        ),
    ]
    result, after = cases.fused(tmp_path / "out", base, *adapters)
    exact = w.astype(np.float64)
    v = exact[24:] + again[0].astype(np.float64) @ again[1]
    change = 0.3 * (magnitude[:, None] / np.linalg.norm(v, axis=1, keepdims=True) * v - exact[24:])
    exact += 0.5 * (whole[0].astype(np.float64) @ whole[1])
    exact[24:] += change - 2 * (part[0].astype(np.float64) @ part[1])
    assert rounding.distances(after[f"{key}.weight"], exact).max() == 0
    (report,) = result.tensors
    assert report.modules == (key, f"{L}.mlp.up_proj")
    assert report.delta_norm == pytest.approx(np.linalg.norm(exact - w), rel=1e-9)


def _norm(array):
    return np.linalg.norm(array.astype(np.float64))
