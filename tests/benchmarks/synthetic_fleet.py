"""Fleets of synthetic adapters, whose changes lie in common spaces to a stated share."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MODULES = {
    "q_proj": (512, 512),
    "v_proj": (128, 512),
    "up_proj": (1408, 512),
    "down_proj": (512, 1408),
}
RANK = 16
COMMON = 32


def write_fleet(folder: Path, count: int, share: float, seed: int = 0) -> list[Path]:
    """Write adapters of rank 16 in bf16; return their paths.

    Of ΔW = B A, a share of the energy of B's columns, and of A's rows, lies in 32 directions which
    all adapters have in common, the rest in directions of its own. Singular values fall by 0.9.
    """
    if folder.exists():
        return sorted(folder.iterdir())
    rng = np.random.default_rng(seed)
    spaces = {
        name: [np.linalg.qr(rng.standard_normal((size, COMMON)))[0] for size in shape]
        for name, shape in MODULES.items()
    }
    decay = 0.9 ** (np.arange(RANK) / 2.0)
    for place in range(count):
        tensors = {}
        for name, shape in MODULES.items():
            b, a = (
                (_columns(rng, space, size, share) * decay)
                for space, size in zip(spaces[name], shape, strict=True)
            )
            prefix = f"base_model.model.model.layers.0.{name}"
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a.T).astype(
                ml_dtypes.bfloat16
            )
            tensors[f"{prefix}.lora_B.weight"] = b.astype(ml_dtypes.bfloat16)
        made = folder / f"adapter-{place:03d}"
        made.mkdir(parents=True)
        save_file(tensors, made / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": sorted(MODULES),
            "base_model_name_or_path": "synthetic",
        }
        (made / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return sorted(folder.iterdir())


def _columns(rng: np.random.Generator, space: np.ndarray, size: int, share: float) -> np.ndarray:
    common = space @ np.linalg.qr(rng.standard_normal((COMMON, RANK)))[0]
    own = np.linalg.qr(rng.standard_normal((size, RANK)))[0]
    return np.sqrt(share) * common + np.sqrt(1.0 - share) * own


def main() -> None:
    """Write the fleet that the command line names: FOLDER COUNT SHARE."""
    folder, count, share = sys.argv[1:]
    write_fleet(Path(folder), int(count), float(share))


if __name__ == "__main__":
    main()
