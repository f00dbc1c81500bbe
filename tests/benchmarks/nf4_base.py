"""Make a bf16 checkpoint with the shapes of layers of a 7B Llama, filled with seeded noise."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from synthetic import SHAPES


def make(out: Path, layers: int, divisor: int = 1) -> None:
    """Write the folder, one shard a layer.

    Args:
        out: where.
        layers: how many.
        divisor: of both sides of every weight.
    """
    rng = np.random.default_rng(0)
    out.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for layer in range(layers):
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        tensors = {}
        for name, (rows, columns) in SHAPES.items():
            shape = (rows // divisor, columns // divisor)
            values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            tensors[f"model.layers.{layer}.{name}.weight"] = values.astype(ml_dtypes.bfloat16)
        weight_map |= dict.fromkeys(tensors, file)
        save_file(tensors, out / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "dtype": "bfloat16"}
    (out / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Parse the command line and make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--divisor", type=int, default=1)
    arguments = parser.parse_args()
    make(arguments.out, arguments.layers, arguments.divisor)


if __name__ == "__main__":
    main()
