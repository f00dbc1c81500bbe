"""Changes below the steps of a type, and adapters that change nothing: said, not passed over."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import loratools as lt
from loratools_formats.disk.errors import AdapterError, UnsupportedError

MODULE = "model.layers.0.self_attn.q_proj"
SHAPE = (16, 12)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a base in bfloat16 of one weight, all numbers of a size."""
    folder = tmp_path / "base"
    folder.mkdir()
    weight = np.random.default_rng(0).uniform(0.1, 0.2, SHAPE).astype(ml_dtypes.bfloat16)
    save_file({f"{MODULE}.weight": weight}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def adapter(folder: Path, size: float | None) -> Path:
    """Write an adapter whose change has numbers of about a size, or one without modules."""
    folder.mkdir()
    rng, tensors = np.random.default_rng(1), {}
    if size is not None:
        name = f"base_model.model.{MODULE}"
        tensors[f"{name}.lora_A.weight"] = rng.uniform(0.5, 1, (2, SHAPE[1])).astype("f4")
        tensors[f"{name}.lora_B.weight"] = size * rng.uniform(0.5, 1, (SHAPE[0], 2)).astype("f4")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_change_below_rounding_can_be_told_neither_from_the_base_nor_from_itself(base, tmp_path):
    small = adapter(tmp_path / "small", 1e-7)
    found = lt.verify(base, base=base, adapters=small)
    assert found.contained is None
    assert found.told == 0.0
    assert found.tensors[0].verdict == "not checked"


def test_an_adapter_without_modules_is_neither_found_nor_fused(base, tmp_path):
    nothing = adapter(tmp_path / "nothing", None)
    for act in (
        lambda: lt.verify(base, base=base, adapters=nothing),
        lambda: lt.fuse(base, nothing),
    ):
        with pytest.raises(AdapterError, match="no tensors"):
            act()


def test_an_adapter_of_which_nothing_would_be_left_is_not_converted(tmp_path):
    file = tmp_path / "d.safetensors"
    diff = np.ones((8, 16), "f4")
    save_file({"lora_unet_mid_block_attentions_0_proj_out.diff": diff}, file)
    with pytest.raises(UnsupportedError, match="nothing would be left"):
        lt.convert(file, to="diffusers", output=tmp_path / "x.safetensors", allow_lossy=True)


def test_a_change_that_shows_is_found_whole(base, tmp_path):
    ordinary = adapter(tmp_path / "ordinary", 1e-2)
    lt.fuse(base, ordinary, output=tmp_path / "fused")
    found = lt.verify(tmp_path / "fused", base=base, adapters=ordinary)
    assert (found.contained, found.told) == (True, 1.0)
    assert lt.verify(base, base=base, adapters=ordinary).contained is False


def test_fuse_asks_before_it_loses_most_of_a_change_to_rounding(base, tmp_path):
    small, output = adapter(tmp_path / "small", 1e-5), tmp_path / "fused"
    with pytest.raises(UnsupportedError, match=r"steps of bf16 erase most.*0\.0 % of ΔW survives"):
        lt.fuse(base, small, output=output)
    assert not output.exists()
    lt.fuse(base, small, output=output, allow_lossy=True)
    wide = lt.fuse(base, small, output=tmp_path / "wide", dtype="f32")
    assert wide.lost_to_rounding < 1e-2
