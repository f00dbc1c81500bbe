"""Make a PEFT adapter with the shapes of a 7B Llama, filled with seeded noise.

All seven linears of 32 layers, bf16. Singular values decay, so that squeezing has something to
find: column i of B is scaled by exp(-4 i/r).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def make(out: Path, rank: int, layers: int = 32, seed: int = 0) -> None:
    """Write the adapter folder."""
    rng = np.random.default_rng(seed)
    decay = np.exp(-4.0 * np.arange(rank) / rank).astype(np.float32)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = rng.standard_normal((rank, columns), dtype=np.float32) * 0.02
            b = rng.standard_normal((rows, rank), dtype=np.float32) * 0.02 * decay
            tensors[f"{prefix}.lora_A.weight"] = a.astype(ml_dtypes.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(ml_dtypes.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in SHAPES),
        "base_model_name_or_path": "synthetic/llama-7b-shapes",
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Parse the command line and make the adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.rank, arguments.layers, arguments.seed)


if __name__ == "__main__":
    main()
