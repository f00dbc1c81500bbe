"""Fixtures that many tests share."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64}


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes a PEFT folder.

    modules maps a path to (out, in, rank); config entries override r = 8, lora_alpha = 16.
    """

    def make(name="adapter", modules=None, *, dtype="bf16", seed=0, extra=None, **config):
        rng = np.random.default_rng(seed)
        tensors = {}
        for path, (out, in_, rank) in (modules or {"layers.0.q": (24, 20, 8)}).items():
            decay = 0.6 ** np.arange(rank)
            a, b = rng.standard_normal((rank, in_)), rng.standard_normal((out, rank)) * decay
            prefix = f"base_model.model.{path}"
            tensors[f"{prefix}.lora_A.weight"] = a.astype(DTYPES[dtype])
            tensors[f"{prefix}.lora_B.weight"] = b.astype(DTYPES[dtype])
        tensors |= extra or {}
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q"]} | config
        (folder / "adapter_config.json").write_text(json.dumps(values))
        return folder

    return make
