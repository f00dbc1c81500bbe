"""What PEFT does to merge adapters, run as a child process that prints its own timings.

Its `add_weighted_adapter` forms the dense ΔW of every adapter in float32, combines them, and takes
a full SVD of the result. Combination and SVD are timed apart, in seconds for one module; importing
torch, reading and writing are not timed. The functions are PEFT's own.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft.utils.merge_utils import task_arithmetic, ties
from safetensors import safe_open


def _deltas(adapters: list[Path], module: str, *, halved: bool) -> list[torch.Tensor]:
    deltas = []
    for adapter in adapters:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
            prefix = f"base_model.model.model.layers.0.{module}"
            a = tensors.get_tensor(f"{prefix}.lora_A.weight").float()
            b = tensors.get_tensor(f"{prefix}.lora_B.weight").float()
        if halved:
            a, b = a[:, : a.shape[1] // 2], b[: b.shape[0] // 2]
        deltas.append((b @ a) * 2.0)
    return deltas


def main() -> None:
    """Time one combination on some modules of layer 0; print seconds by module as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("combination", choices=["svd", "ties_svd"])
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--modules", nargs="+", required=True)
    parser.add_argument(
        "--halve", nargs="*", default=[], help="modules of which a quarter is taken"
    )
    parser.add_argument("--no-svd", action="store_true", help="time the combination only")
    arguments = parser.parse_args()
    weights = torch.ones(len(arguments.adapters))
    times = {}
    for module in arguments.modules:
        start = time.perf_counter()
        deltas = _deltas(arguments.adapters, module, halved=module in arguments.halve)
        if arguments.combination == "svd":
            merged = task_arithmetic(deltas, weights)
        else:
            merged = ties(deltas, weights, density=0.2)
        combined = time.perf_counter()
        if not arguments.no_svd:
            torch.linalg.svd(merged, full_matrices=True)
        times[module] = [combined - start, time.perf_counter() - combined]
    print(json.dumps(times))


if __name__ == "__main__":
    main()
