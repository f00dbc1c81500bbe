"""Changes without factors under fused and split names: merged to the sum, compared as one."""

from __future__ import annotations

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt

WIDTH = 16
BLOCK = re.compile(r"blocks_(\d)")
PARTS = {"to_q": 0, "to_k": 1, "to_v": 2, "proj_mlp": 3}


def lora(values, key, out, columns):
    return {
        f"{key}.lora_down.weight": values(3, columns),
        f"{key}.lora_up.weight": values(out, 3),
        f"{key}.alpha": np.array(1.5, np.float32),
    }


def loha(values, key, out, columns, rank=2):
    sides = {"w1_a": (out, rank), "w1_b": (rank, columns), "w2_a": (out, rank),
             "w2_b": (rank, columns)}  # fmt: skip
    made = {f"{key}.hada_{name}": values(*shape) for name, shape in sides.items()}
    return made | {f"{key}.alpha": np.array(1.0, np.float32)}


def loha_of_full_rank(values, key, out, columns):
    return loha(values, key, out, columns, rank=8)


def lokr(values, key, out, columns):
    factors = {f"{key}.lokr_w1": values(4, 4), f"{key}.lokr_w2": values(out // 4, columns // 4)}
    return factors | {f"{key}.alpha": np.array(1.0, np.float32)}


def full(values, key, out, columns):
    return {f"{key}.diff": values(out, columns)}


def some_full(values, key, out, columns):
    """Without keys, as if none had been trained."""
    return {} if key.endswith("to_k") else full(values, key, out, columns)


def mixed(values, key, out, columns):
    make = {"k": lora, "q": full}.get(key[-1], full)
    return make(values, key, out, columns)


KINDS = (lora, loha, loha_of_full_rank, lokr, full)


def fused(path, kind, seed):
    """Return a FLUX file as kohya's trainers have it."""
    made, values = {}, values_of(seed)
    for block in range(2):
        double = f"lora_unet_double_blocks_{block}_img_attn"
        made |= kind(values, f"{double}_qkv", 3 * WIDTH, WIDTH)
        made |= kind(values, f"{double}_proj", WIDTH, WIDTH)
        made |= kind(values, f"lora_unet_single_blocks_{block}_linear1", 7 * WIDTH, WIDTH)
    return saved(path, made)


def split(path, kind, seed):
    """Return a FLUX file as OneTrainer has it."""
    made, values = {}, values_of(seed)
    for block in range(2):
        double = f"lora_transformer_transformer_blocks_{block}_attn"
        single = f"lora_transformer_single_transformer_blocks_{block}"
        for part in ("to_q", "to_k", "to_v"):
            made |= kind(values, f"{double}_{part}", WIDTH, WIDTH)
            made |= kind(values, f"{single}_attn_{part}", WIDTH, WIDTH)
        made |= kind(values, f"{double}_to_out_0", WIDTH, WIDTH)
        made |= kind(values, f"{single}_proj_mlp", 4 * WIDTH, WIDTH)
    return saved(path, made)


def values_of(seed):
    generator = np.random.default_rng(seed)
    return lambda *shape: (0.3 * generator.standard_normal(shape)).astype(np.float32)


def saved(path, tensors):
    save_file(tensors, path)
    return path


def changes(path):
    """Return the dense changes of a file by block and fused module."""
    adapter, found = lt.read(path), {}
    for name in adapter.modules:
        change, block = lt.delta(adapter, name), BLOCK.search(name)[1]
        is_single = "single" in name
        part = next((p for p in PARTS if name.endswith(p)), None)
        if part is None:
            leaf = "out" if name.endswith(("img_attn_proj", "to_out_0")) else "qkv"
            found[is_single, block, leaf] = change
            continue
        rows = (7 if is_single else 3) * WIDTH
        whole = found.setdefault((is_single, block, "qkv"), np.zeros((rows, WIDTH)))
        start = PARTS[part] * WIDTH
        whole[start : start + len(change)] = change
    return found


def pairs():
    for kind in (*KINDS, some_full, mixed):
        for other in (loha, full, lora):
            yield pytest.param(kind, other, id=f"{kind.__name__}-{other.__name__}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "other"), pairs())
@pytest.mark.parametrize("split_first", [True, False])
def test_a_merge_of_fused_and_split_names_is_the_sum(kind, other, split_first, tmp_path):
    one = split(tmp_path / "split.safetensors", kind, 1)
    two = fused(tmp_path / "fused.safetensors", other, 2)
    first, second = (one, two) if split_first else (two, one)
    result = lt.merge({first: 0.7, second: -0.4}, output=tmp_path / "sum.safetensors")
    found, a, b = (changes(path) for path in (tmp_path / "sum.safetensors", first, second))
    like = (split if split_first else fused)(tmp_path / "like.safetensors", lora, 0)
    assert lt.read(tmp_path / "sum.safetensors").modules.keys() == lt.read(like).modules.keys()
    assert found.keys() == a.keys() | b.keys()
    for name, change in found.items():
        want = 0.7 * a[name] - 0.4 * b[name]
        np.testing.assert_allclose(change, want, rtol=0, atol=3e-7 * np.abs(want).max())
    assert result.relative_error < 1e-6


@pytest.mark.parametrize("kind", [*KINDS, some_full, mixed])
def test_compare_finds_fused_and_split_names_in_each_other(kind, tmp_path):
    one = split(tmp_path / "split.safetensors", kind, 1)
    two = fused(tmp_path / "fused.safetensors", loha, 2)
    a, b = (changes(path) for path in (one, two))
    product = sum((a[name] * b[name]).sum() for name in a)
    norms = [np.sqrt(sum((v**2).sum() for v in each.values())) for each in (a, b)]
    for order in ([one, two], [two, one]):
        found = lt.compare(order)
        assert not found.findings
        want = product / (norms[0] * norms[1])
        assert found.to_dict()["whole_cosines"][0][1] == pytest.approx(want, abs=1e-6)
