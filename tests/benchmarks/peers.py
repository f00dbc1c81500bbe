"""What others do to squeeze an adapter, run as a child process that prints its own timings.

Each forms the dense ΔW in float32 and decomposes it. Only that is timed, in seconds for one
module; not the import of torch, reading or writing.

- `svd` does what PEFT's `add_weighted_adapter(combination_type="svd")` does to each module:
  `torch.linalg.svd` of the dense ΔW with its default `full_matrices=True`, then truncation.
- `lowrank` uses `torch.svd_lowrank(q=rank + 10, niter=2)`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open


def peft_svd(b: torch.Tensor, a: torch.Tensor, scale: float, rank: int) -> float:
    """Return the seconds that PEFT's way takes."""
    start = time.perf_counter()
    u, s, vh = torch.linalg.svd((b @ a) * scale, full_matrices=True)
    u = u[:, :rank] @ torch.diag(s[:rank])
    vh = vh[:rank, :]
    return time.perf_counter() - start


def svd_lowrank(b: torch.Tensor, a: torch.Tensor, scale: float, rank: int) -> float:
    """Return the seconds that a randomised SVD takes."""
    start = time.perf_counter()
    u, s, v = torch.svd_lowrank((b @ a) * scale, q=rank + 10, niter=2)
    root = s[:rank].sqrt()
    u, v = u[:, :rank] * root, v[:, :rank] * root
    return time.perf_counter() - start


def main() -> None:
    """Time one method on the first layers of an adapter; print seconds by module shape as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["svd", "lowrank"])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--layers", type=int, default=1, help="layers to time, each module of them")
    parser.add_argument("--one-each", action="store_true", help="one module of each shape only")
    parser.add_argument("--skip", default="", help="OUTxIN not to time")
    arguments = parser.parse_args()
    method = {"svd": peft_svd, "lowrank": svd_lowrank}[arguments.method]
    times: dict[str, list[float]] = defaultdict(list)
    with safe_open(arguments.adapter / "adapter_model.safetensors", framework="pt") as tensors:
        names = tensors.keys()
        for key in sorted(name for name in names if ".lora_A." in name):
            if int(key.partition(".layers.")[2].partition(".")[0]) >= arguments.layers:
                continue
            a = tensors.get_tensor(key).float()
            b = tensors.get_tensor(key.replace(".lora_A.", ".lora_B.")).float()
            shape = f"{b.shape[0]}x{a.shape[1]}"
            if shape == arguments.skip or (arguments.one_each and shape in times):
                continue
            times[shape].append(method(b, a, 2.0, arguments.rank))
    print(json.dumps(times))


if __name__ == "__main__":
    main()
