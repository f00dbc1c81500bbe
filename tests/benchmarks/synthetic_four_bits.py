"""Make a checkpoint with the shapes of a 1.1B Llama in MLX's four bits, and an adapter for it.

Forty-one layers are about 1 GB. Every layer has the same values, which nothing here can notice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from synthetic_base import BF16, SHAPES, main, write_layers

GROUP, BITS = 64, 4


def make_base(out: Path, layers: int, seed: int = 0) -> None:
    """Write the checkpoint folder."""
    rng = np.random.default_rng(seed)
    one: dict[str, Any] = {}
    for name, (rows, columns) in SHAPES.items():
        codes = rng.integers(0, 1 << 32, (rows, columns * BITS // 32), np.uint32)
        scales = rng.uniform(0.004, 0.008, (rows, columns // GROUP)).astype(BF16)
        one[f"{name}.weight"], one[f"{name}.scales"] = codes, scales
        one[f"{name}.biases"] = (-8 * scales.astype(np.float32)).astype(BF16)
    config = {"quantization": {"bits": BITS, "group_size": GROUP}}
    write_layers(out, layers, one, config, form="mlx")


if __name__ == "__main__":
    main(make_base, layers=41)
