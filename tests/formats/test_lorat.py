"""LoRAT's fused projections, beside what its layers add to their outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from statedicts import base_of, close, deltas_of, saved

from loratools_formats import find_format, read_adapter, write_adapter
from loratools_formats.disk.errors import AdapterError, UnsupportedError

RNG = np.random.default_rng(0)
DIM, RANK = 12, 3
QKV, KV, FC = "blocks.0.attn.qkv", "blocks.1.attn.kv", "blocks.0.mlp.fc1"
SHAPES = {QKV: (3 * DIM, DIM), KV: (2 * DIM, DIM), FC: (20, DIM)}


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def checkpoint(left_out=()):
    tensors = {}
    for name in [f"{QKV}.{p}" for p in "qkv"] + [f"{KV}.{p}" for p in "kv"] + [FC]:
        if name not in left_out:
            tensors[f"{name}.lora.A"] = random(RANK, DIM)
            tensors[f"{name}.lora.B"] = random(20 if name == FC else DIM, RANK)
    return tensors


def forward(tensors, x, module, scale):
    """Return what `LoRALayer.forward` adds; nothing for a part without one."""
    if f"{module}.lora.A" not in tensors:
        return np.zeros((len(x), DIM))
    a, b = (tensors[f"{module}.lora.{side}"].astype("f8") for side in "AB")
    return (x @ a.T @ b.T) * scale


def check(got, tensors, scale):
    x = RNG.standard_normal((5, DIM))
    for name, parts in ((QKV, "qkv"), (KV, "kv"), (FC, "")):
        modules = [f"{name}.{part}" for part in parts] or [name]
        close(x @ got[name].T, np.concatenate([forward(tensors, x, m, scale) for m in modules], 1))


@pytest.mark.parametrize("rslora", [False, True])
def test_every_part_has_its_own_pair(tmp_path, rslora):
    tensors = checkpoint()
    root = {"lora_alpha": np.array(8.0, np.float32), "use_rslora": np.array(rslora)}
    head = {"head.cls.weight": random(4, DIM)}
    path = saved(tmp_path / "model.bin", tensors | root | head)
    assert find_format(path).name == "lorat"
    got, result = deltas_of(path, SHAPES)
    check(got, tensors, 8 / (math.sqrt(RANK) if rslora else RANK))
    assert result.adapter.modules[QKV].rank == 3 * RANK
    write_adapter(result.adapter, tmp_path / "out", "peft")
    (kept,) = read_adapter(tmp_path / "out").replacements.values()
    np.testing.assert_array_equal(kept.tensor.load(), head["head.cls.weight"])


def test_a_part_without_a_pair_does_not_change(tmp_path):
    tensors = checkpoint(left_out=[f"{QKV}.k", f"{KV}.k"])
    path = saved(tmp_path / "model.safetensors", tensors)
    assert find_format(path).name == "lorat"
    base = base_of(tmp_path / "base", {name: np.zeros(shape) for name, shape in SHAPES.items()})
    got, _ = deltas_of(path, SHAPES, base=base, alpha=1)
    check(got, tensors, 1 / RANK)
    assert not got[QKV][DIM : 2 * DIM].any()


def test_alpha_is_asked_for_where_it_is_left_out(tmp_path):
    path = saved(tmp_path / "model.safetensors", checkpoint())
    with pytest.raises(UnsupportedError, match="--set alpha=VALUE"):
        deltas_of(path, SHAPES)


@pytest.mark.parametrize(
    "extra",
    [
        {f"{QKV}.q.linear.weight": random(DIM, DIM)},
        {f"{FC}.linear.bias": random(20)},
        {"lora_alpha": np.array(8.0, np.float32)},
        {"lora_alpha": random(2), "use_rslora": np.array(False)},
        {"blocks.2.attn.qkv.q.lora.A": random(RANK, DIM)},
    ],
)
def test_what_does_not_belong_is_refused(tmp_path, extra):
    path = saved(tmp_path / "model.safetensors", checkpoint() | extra)
    with pytest.raises(AdapterError):
        read_adapter(path)


def test_parts_of_unequal_height_are_refused(tmp_path):
    tensors = checkpoint() | {f"{QKV}.v.lora.B": random(DIM + 1, RANK)}
    with pytest.raises(AdapterError, match=r"qkv\.v\.lora\.B"):
        deltas_of(saved(tmp_path / "model.safetensors", tensors), SHAPES, alpha=1)
