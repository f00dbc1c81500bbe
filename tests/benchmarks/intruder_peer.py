"""Make a base for the intruder analysis, or analyse it as PEFT does: two full SVDs a weight.

    python intruder_peer.py make BASE ADAPTER
    python intruder_peer.py analyse BASE ADAPTER

The base has one weight of 2048×2048 in bf16, the adapter rank 64. The analysis is that of PEFT's
`reduce_intruder_dimension` on a live model, without its edit: SVDs of W and of W + ΔW, then the
cosines of the leading left singular vectors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

NAMES = ["model.layers.0.self_attn.q_proj"]
SIDE, RANK = 2048, 64


def make(folder: Path, adapter: Path) -> None:
    """Write the base and the adapter."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    weights = {
        f"{name}.weight": (rng.standard_normal((SIDE, SIDE), np.float32) * 0.02).astype(
            ml_dtypes.bfloat16
        )
        for name in NAMES
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": SIDE, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    factors = {}
    for name in NAMES:
        for side, shape in (("A", (RANK, SIDE)), ("B", (SIDE, RANK))):
            values = rng.standard_normal(shape, np.float32) * 0.03
            factors[f"base_model.model.{name}.lora_{side}.weight"] = values.astype(
                ml_dtypes.bfloat16
            )
    adapter.mkdir(parents=True)
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def analyse(base: Path, adapter: Path) -> None:
    """Count intruder dimensions by full SVDs."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    scale = 2.0
    for name in NAMES:
        weight = weights[f"{name}.weight"].float()
        b, a = (factors[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "BA")
        before = torch.linalg.svd(weight, full_matrices=False)[0]
        after = torch.linalg.svd(weight + scale * b @ a, full_matrices=False)[0]
        cosines = (before.T @ after[:, :10]).abs().max(dim=0).values
        print(name, int((cosines < 0.5).sum()))


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"make": make, "analyse": analyse}[command](*map(Path, paths))
