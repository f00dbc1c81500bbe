"""Make a large DoRA with its base weight, and decompose its change densely, as a peer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

NAME = "model.layers.0.mlp.down_proj"
PREFIX = f"base_model.model.{NAME}"


def make(out: int, in_: int, rank: int) -> None:
    """Write `base/` and `dora/` into the current folder."""
    rng = np.random.default_rng(0)
    weight = (0.02 * rng.standard_normal((out, in_), dtype=np.float32)).astype(ml_dtypes.bfloat16)
    a = 0.01 * rng.standard_normal((rank, in_), dtype=np.float32)
    b = 0.01 * rng.standard_normal((out, rank), dtype=np.float32)
    norms = np.linalg.norm(weight.astype(np.float32) + 2.0 * b @ a, axis=1)
    magnitude = norms * (1.0 + 0.01 * rng.standard_normal(out, dtype=np.float32))
    for name in ("base", "dora"):
        Path(name).mkdir()
    save_file({f"{NAME}.weight": weight}, "base/model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    Path("base/config.json").write_text(json.dumps(config))
    tensors = {
        f"{PREFIX}.lora_A.weight": a.astype(ml_dtypes.bfloat16),
        f"{PREFIX}.lora_B.weight": b.astype(ml_dtypes.bfloat16),
        f"{PREFIX}.lora_magnitude_vector": magnitude.astype(np.float32),
    }
    save_file(tensors, "dora/adapter_model.safetensors", metadata={"format": "pt"})
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": True}
    values |= {"target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    Path("dora/adapter_config.json").write_text(json.dumps(values))


def dense(ranks: list[int]) -> dict[str, float]:
    """Return the least relative error of each rank, by an SVD of the whole change."""
    tensors = load_file("dora/adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}.lora_{side}.weight"].astype(np.float32) for side in "AB")
    weight = load_file("base/model.safetensors")[f"{NAME}.weight"].astype(np.float32)
    moved = weight + 2.0 * b @ a
    gains = tensors[f"{PREFIX}.lora_magnitude_vector"] / np.linalg.norm(moved, axis=1)
    _, sigma, _ = np.linalg.svd(gains[:, None] * moved - weight, full_matrices=False)
    energy = sigma.astype(np.float64) ** 2
    return {str(rank): float(np.sqrt(energy[rank:].sum() / energy.sum())) for rank in ranks}


if __name__ == "__main__":
    command, *numbers = sys.argv[1:]
    if command == "make":
        make(*map(int, numbers))
    else:
        print(json.dumps(dense([int(number) for number in numbers])))
