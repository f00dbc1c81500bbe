"""Make a checkpoint with the shapes of a 1.1B Llama in MLX's four bits, and an adapter for it.

Forty-one layers are about 1 GB. Every layer has the same values, which nothing here can notice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from synthetic_base import BF16, LAYERS_PER_SHARD, SHAPES, make_adapter

GROUP, BITS = 64, 4


def make_base(out: Path, layers: int, seed: int = 0) -> None:
    """Write the checkpoint folder, config.json last."""
    rng = np.random.default_rng(seed)
    one = {}
    for name, (rows, columns) in SHAPES.items():
        codes = rng.integers(0, 1 << 32, (rows, columns * BITS // 32), np.uint32)
        scales = rng.uniform(0.004, 0.008, (rows, columns // GROUP)).astype(BF16)
        one[f"{name}.weight"], one[f"{name}.scales"] = codes, scales
        one[f"{name}.biases"] = (-8 * scales.astype(np.float32)).astype(BF16)
    out.mkdir(parents=True, exist_ok=True)
    count = -(-layers // LAYERS_PER_SHARD)
    weight_map: dict[str, str] = {}
    for shard in range(count):
        file = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        first = shard * LAYERS_PER_SHARD
        held = {
            f"model.layers.{layer}.{name}": array
            for layer in range(first, min(first + LAYERS_PER_SHARD, layers))
            for name, array in one.items()
        }
        save_file(held, out / file, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "dtype": "bfloat16", "num_hidden_layers": layers}
    config["quantization"] = {"bits": BITS, "group_size": GROUP}
    (out / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Write both from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--layers", type=int, default=41)
    arguments = parser.parse_args()
    make_base(arguments.base, arguments.layers)
    make_adapter(arguments.adapter, arguments.layers)


if __name__ == "__main__":
    main()
