"""Checkpoints for the tests of quantize and dequantize."""

import json

import numpy as np
import pytest
from fourbit_cases import DTYPES
from safetensors.numpy import save_file

LLAMA = {
    "embed_tokens": (40, 32), "layers.0.self_attn.q_proj": (32, 32), "layers.0.mlp.up": (80, 33),
    "layers.1.self_attn.q_proj": (32, 32), "layers.1.mlp.up": (80, 33),
}  # fmt: skip


@pytest.fixture
def make_base(tmp_path):
    """Return a function that writes a checkpoint folder of 2-D weights, in two shards."""

    def make(name="base", weights=None, *, dtype="bf16", extra=None, seed=0, **config):
        rng = np.random.default_rng(seed)
        folder = tmp_path / name
        folder.mkdir()
        tensors = {
            f"model.{module}.weight": rng.standard_normal(shape).astype(DTYPES[dtype])
            for module, shape in (weights or LLAMA).items()
        }
        tensors["model.norm.weight"] = np.ones(32, DTYPES[dtype])
        tensors |= extra or {}
        keys = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": keys[::2]}
        shards["model-00002-of-00002.safetensors"] = keys[1::2]
        for file, names in shards.items():
            save_file({k: tensors[k] for k in names}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {k: f for f, ks in shards.items() for k in ks}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        values = {"model_type": "llama", "dtype": "bfloat16", "vocab_size": 40} | config
        (folder / "config.json").write_text(json.dumps(values))
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make
