"""`extract` holds no more than the largest tensor of the checkpoints, however it lies."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

# Each is 64 MiB in float32, and 32 MiB as it is stored.
LAID = {
    "Conv1D": ({"model_type": "gpt2"}, "h.0.mlp.c_fc.weight", (2048, 8192)),
    "linear, wide": ({"model_type": "llama"}, "model.layers.0.mlp.down_proj.weight", (512, 32768)),
    "embedding": ({"model_type": "llama"}, "model.embed_tokens.weight", (32768, 512)),
    "experts": (
        {"model_type": "gpt_oss"},
        "model.layers.0.mlp.experts.down_proj",
        (16, 1024, 1024),
    ),
}
STORED = 32 << 20


def written(folder, key, shape, config):
    """Write a base and a tuned checkpoint of one tensor, and a head that says it is not tied."""
    rng = np.random.default_rng(0)
    old = rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
    new = old + rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
    head = {"lm_head.weight": np.zeros((4, 4), np.float32)}
    for name, values in (("base", old), ("tuned", new)):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        save_file({key: values, **head}, folder / name / "model.safetensors")
    return folder / "base", folder / "tuned"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    key = "model.layers.0.mlp.up_proj.weight"
    return written(tmp_path_factory.mktemp("small"), key, (24, 32), {"model_type": "llama"})


@pytest.mark.parametrize("name", LAID)
def test_memory_is_bounded_by_the_largest_tensor(loratools, small, tmp_path, name):
    config, key, shape = LAID[name]
    base, tuned = written(tmp_path, key, shape, config)
    idle = loratools("extract", *small, "--rank", "8", "-o", tmp_path / "small", "-q")
    run = loratools("extract", base, tuned, "--rank", "8", "-o", tmp_path / "out", "-q")
    assert run.code == idle.code == 0, run.err
    assert run.peak_bytes - idle.peak_bytes <= 2 * STORED
