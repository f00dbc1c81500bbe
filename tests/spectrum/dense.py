"""Dense truth in float64, read from the files without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes  # noqa: F401 - registers bfloat16 for safetensors
import numpy as np
from safetensors import safe_open

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny-llama"


def tensors(file):
    """Return every tensor of a safetensors file in float64."""
    import torch  # noqa: F401 - decodes bfloat16

    with safe_open(file, "pt") as handle:
        return {key: handle.get_tensor(key).double().numpy() for key in handle.keys()}  # noqa: SIM118


def peft_changes(folder):
    """Return scale·B·A by module path, by PEFT's definition of scale and patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = tensors(folder / "adapter_model.safetensors")
    changes = {}
    for key, a in stored.items():
        if not key.endswith("lora_A.weight"):
            continue
        path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = len(a)
        alpha = next(
            (v for k, v in config.get("alpha_pattern", {}).items() if path.endswith(k)),
            config["lora_alpha"],
        )
        scale = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
        changes[path] = scale * stored[key.replace("lora_A", "lora_B")] @ a
    return changes


def base_weights():
    """Return the tiny Llama's weights by module path."""
    stored = tensors(TINY / "model" / "model.safetensors")
    return {
        key.removesuffix(".weight"): value
        for key, value in stored.items()
        if key.endswith(".weight")
    }


def intruders(weight, change, count, epsilon):
    """Return cosines and intruders by the paper's definition (arXiv 2410.21228), two whole SVDs."""
    before = np.linalg.svd(weight, full_matrices=False)[0]
    after, sizes, right = np.linalg.svd(weight + change, full_matrices=False)
    cosines = np.abs(after.T @ before).max(axis=1)[:count]
    return cosines, np.flatnonzero(cosines < epsilon), (after, sizes, right)
