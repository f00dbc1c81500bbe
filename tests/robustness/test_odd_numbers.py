"""Numbers at their edges in files from strangers: refused in words, or handled as they stand."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

import loratools as lt
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.strict_json import StrictJsonError, loads
from loratools_formats.formats.peft.patterns import matches_whole

MODULE = "lora_unet_mid_block_attentions_0_proj_in"


def kohya(path, alpha):
    """Write a kohya file of one module by hand; alpha is (type, bytes)."""
    rng, head, data = np.random.default_rng(0), {}, b""
    down, up = (rng.standard_normal(shape).astype("<f4") for shape in ((4, 16), (16, 4)))
    tensors = {
        f"{MODULE}.lora_down.weight": ("F32", [4, 16], down.tobytes()),
        f"{MODULE}.lora_up.weight": ("F32", [16, 4], up.tobytes()),
        f"{MODULE}.alpha": (alpha[0], [], alpha[1]),
    }
    for name, (code, shape, raw) in tensors.items():
        span = [len(data), len(data) + len(raw)]
        head[name] = {"dtype": code, "shape": shape, "data_offsets": span}
        data += raw
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "alpha", [("C64", struct.pack("<ff", 2, 3)), ("BOOL", b"\1")], ids=["complex", "boolean"]
)
def test_an_alpha_that_is_no_real_number_is_refused(alpha, tmp_path):
    with pytest.raises(AdapterError, match="alpha is no number"):
        lt.read(kohya(tmp_path / "x.safetensors", alpha))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_first_adapter_of_alpha_zero_merges_as_any(order, tmp_path):
    zero = kohya(tmp_path / "zero.safetensors", ("F32", struct.pack("<f", 0)))
    good = kohya(tmp_path / "good.safetensors", ("F32", struct.pack("<f", 2)))
    pair = (zero, good)
    merged = lt.merge([pair[i] for i in order]).adapter
    (name,) = merged.modules
    want = lt.delta(lt.read(good), name)
    got = lt.delta(merged, name)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)


def test_a_number_beyond_float64_is_no_json_of_ours():
    with pytest.raises(StrictJsonError, match="too large"):
        loads(b'{"rope_theta": 1e999}')


def test_a_foreign_expression_is_bounded_by_its_own_time():
    assert matches_whole(r".*\.(fc1|fc2)", "model.fc1")
    assert not matches_whole(r"fc1|fc2", "model.fc1")
    with pytest.raises(AdapterError, match="too long to match"):
        matches_whole(r"((\w|\.)+)+#", "model.layers.0.self_attn.q_proj")
