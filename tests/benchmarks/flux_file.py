"""A kohya file with the shapes of FLUX.1, filled with seeded noise, and how sd-scripts resizes it.

`make` writes the file: all linears of 19 double and 38 single blocks, bf16, singular values of a
module decaying as k^-0.8. `dense` times, for one module of each shape, what sd-scripts does since
version 0.11: the dense ΔW in float32, and `torch.svd_lowrank(q=2·rank, niter=2)` of it; it prints
seconds by shape, without import, reading or writing.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

H = 3072
DOUBLE = {
    f"{stream}_{name}": shape
    for stream in ("img", "txt")
    for name, shape in {
        "attn_qkv": (3 * H, H),
        "attn_proj": (H, H),
        "mlp_0": (4 * H, H),
        "mlp_2": (H, 4 * H),
        "mod_lin": (6 * H, H),
    }.items()
}
SINGLE = {"linear1": (7 * H, H), "linear2": (H, 5 * H), "modulation_lin": (3 * H, H)}
BLOCKS = {"double": (19, DOUBLE), "single": (38, SINGLE)}


def modules() -> dict[str, tuple[int, int]]:
    """Return (out, in) of every module by its name."""
    return {
        f"lora_unet_{kind}_blocks_{block}_{name}": shape
        for kind, (count, shapes) in BLOCKS.items()
        for block in range(count)
        for name, shape in shapes.items()
    }


def make(path: Path, rank: int) -> None:
    """Write the file."""
    rng = np.random.default_rng(0)
    decay = np.arange(1, rank + 1, dtype=np.float32) ** -0.8
    tensors = {}
    for name, (out, columns) in modules().items():
        down = rng.standard_normal((rank, columns), dtype=np.float32) * 0.02
        up = rng.standard_normal((out, rank), dtype=np.float32) * 0.02 * decay
        tensors[f"{name}.lora_down.weight"] = down.astype(ml_dtypes.bfloat16)
        tensors[f"{name}.lora_up.weight"] = up.astype(ml_dtypes.bfloat16)
        tensors[f"{name}.alpha"] = np.array(rank / 2, np.float32)
    save_file(tensors, path, {"ss_network_dim": str(rank), "ss_network_alpha": str(rank / 2)})


def dense(path: Path, rank: int) -> dict[str, float]:
    """Return seconds that one module of each shape takes."""
    import torch

    times: dict[str, float] = {}
    with safe_open(path, framework="pt") as tensors:
        for name, (out, columns) in modules().items():
            shape = f"{out}x{columns}"
            if shape in times:
                continue
            up = tensors.get_tensor(f"{name}.lora_up.weight").float()
            down = tensors.get_tensor(f"{name}.lora_down.weight").float()
            start = time.perf_counter()
            u, s, v = torch.svd_lowrank(up @ down, q=2 * rank, niter=2)
            _ = (u[:, :rank] @ torch.diag(s[:rank]), v[:, :rank].T)
            times[shape] = time.perf_counter() - start
    return times


def main() -> None:
    """Parse the command line; make the file, or time the dense way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "dense"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.what == "make":
        make(arguments.path, arguments.rank)
    else:
        print(json.dumps(dense(arguments.path, arguments.rank)))


if __name__ == "__main__":
    main()
