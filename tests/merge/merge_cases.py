"""Adapter folders for the merge tests, and their true ΔW, read without our reader.

Files are written tensor by tensor and read back by `true_deltas`, which follows PEFT's formulas
(peft 0.21.2, tuners/lora/layer.py) and shares no code with loratools.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file

from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.operation import merge
from loratools.operations.merge.options import MergeOptions
from loratools.operations.merge.result import MergeResult
from loratools_formats import read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.dtypes import Array

Deltas = dict[str, Array]

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "f64": np.float64}


@dataclass(frozen=True)
class Module:
    """A module of an adapter to write.

    Attributes:
        out: outputs; channels of a convolution, dimension of an embedding.
        in_: inputs; channels of a convolution, vocabulary of an embedding.
        rank: r, per expert.
        kind: `linear`, `conv`, `embedding` or `experts`.
        kernel: of a convolution.
        count: of experts.
    """

    out: int
    in_: int
    rank: int
    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    count: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each factor by the end of its name."""
        if self.kind == "embedding":
            return {
                "lora_embedding_A": (self.rank, self.in_),
                "lora_embedding_B": (self.out, self.rank),
            }
        if self.kind == "conv":
            ones = tuple(1 for _ in self.kernel)
            return {
                "lora_A.weight": (self.rank, self.in_, *self.kernel),
                "lora_B.weight": (self.out, self.rank, *ones),
            }
        total = self.rank * self.count
        return {"lora_A.weight": (total, self.in_), "lora_B.weight": (self.out, total)}


def linear(out: int, in_: int, rank: int) -> Module:
    """Return a linear layer's module."""
    return Module(out, in_, rank)


MODULES = {"layers.0.q": linear(24, 20, 8), "layers.1.down": linear(16, 40, 8)}


def save(
    folder: Path,
    modules: Mapping[str, Module] = MODULES,
    *,
    dtype: str = "f32",
    seed: int = 0,
    extra: Mapping[str, Array] | None = None,
    **config: Any,
) -> Path:
    """Write a PEFT folder.

    Experts adapt the parameter `w` of their module. Ranks that differ from `r` go into
    `rank_pattern` unless it is given.
    """
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for path, module in modules.items():
        decay = 0.7 ** np.arange(module.rank)
        for end, shape in module.shapes().items():
            values = rng.standard_normal(shape)
            if module.kind != "experts" and "_B" in end:
                values *= decay.reshape(-1, *(1 for _ in module.kernel))
            tensors[f"{PREFIX}{path}.{end}"] = values.astype(DTYPES[dtype])
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in (extra or {}).items()}
    rank = config.setdefault("r", max(module.rank for module in modules.values()))
    leaves = sorted({p.rpartition(".")[2] for p, m in modules.items() if m.kind != "experts"})
    parameters = {p: f"{p}.w" for p, m in modules.items() if m.kind == "experts"}
    values = {
        "peft_type": "LORA", "lora_alpha": 16, "target_modules": leaves, "peft_version": "0.21.2",
        "target_parameters": sorted(parameters.values()) or None,
        "rank_pattern": {
            parameters.get(p, p): m.rank for p, m in modules.items() if m.rank != rank
        },
    } | config  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values))
    return folder


def stored(folder: Path) -> Deltas:
    """Return the tensors of a folder in float64, by name without the prefix."""
    tensors = load_file(folder / WEIGHTS)
    return {key.removeprefix(PREFIX): tensor.double().numpy() for key, tensor in tensors.items()}


def raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return type, shape and bytes of each tensor of a folder."""
    import torch

    return {
        key: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for key, t in load_file(folder / WEIGHTS).items()
    }


def config_of(folder: Path) -> dict[str, Any]:
    """Return a folder's configuration."""
    values: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return values


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def scale_and_rank(config: Mapping[str, Any], name: str) -> tuple[float, int]:
    """Return the factor of B·A and r of a module, as PEFT resolves them."""
    rank = _pattern(config.get("rank_pattern"), name, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), rank


def true_deltas(folder: Path) -> Deltas:
    """Return ΔW (out, in) of every module, (E, out, in) of experts, in float64."""
    config, tensors = config_of(folder), stored(folder)
    result: Deltas = {}
    for name, a in tensors.items():
        path, found, _ = name.partition(".lora_embedding_A")
        other = f"{path}.lora_embedding_B"
        if not found:
            path, found, _ = name.partition(".lora_A.weight")
            other = f"{path}.lora_B.weight"
        if not found:
            continue
        b = tensors[other]
        parameter = _parameter(config, path)
        scale, rank = scale_and_rank(config, parameter or path)
        if parameter and a.shape[0] != rank:
            count = a.shape[0] // rank
            per_expert = b.reshape(b.shape[0], rank, count).transpose(2, 0, 1)
            result[path] = scale * per_expert @ a.reshape(count, rank, -1)
        else:
            assert a.shape[0] == rank
            result[path] = scale * b.reshape(b.shape[0], -1) @ a.reshape(rank, -1)
    return result


def _parameter(config: Mapping[str, Any], path: str) -> str | None:
    for target in config.get("target_parameters") or ():
        if target.rpartition(".")[0] == path:
            return str(target)
    return None


def run(
    out: Path,
    pairs: Sequence[tuple[Path, float]],
    method: str = "linear",
    *,
    base: Path | None = None,
    **options: Any,
) -> tuple[MergeResult, Deltas]:
    """Merge folders into `out`, and return the result and the true ΔW of what was written."""
    inputs = [MergeInput(read_adapter(path), weight, path.name) for path, weight in pairs]
    checkpoint = None if base is None else read_checkpoint(base)
    result = merge(inputs, MergeOptions(method=method, **options), base=checkpoint)
    write_adapter(result.adapter, out, "peft")
    return result, true_deltas(out)


def weighted_sum(pairs: Sequence[tuple[Path, float]]) -> Deltas:
    """Return Σ w·ΔW, where a module that an adapter lacks counts as zero."""
    total: Deltas = {}
    for path, weight in pairs:
        for name, delta in true_deltas(path).items():
            total[name] = total.get(name, 0.0) + weight * delta
    return total


def all_stacked(pairs: Sequence[tuple[Path, float]]) -> Deltas:
    """Return every module's ΔW of all adapters: (T, …), zeros where one lacks it."""
    found = [true_deltas(path) for path, _ in pairs]
    shapes = {name: delta.shape for deltas in found for name, delta in deltas.items()}
    return {
        name: np.stack([deltas.get(name, np.zeros(shape)) for deltas in found])
        for name, shape in shapes.items()
    }


def stacked(pairs: Sequence[tuple[Path, float]], name: str) -> Array:
    """Return one module's ΔW of all adapters: (T, out, in)."""
    return all_stacked(pairs)[name]


def distance(got: Array, want: Array) -> float:
    """‖got − want‖ / ‖want‖; ‖got‖ where `want` is zero."""
    whole = float(np.linalg.norm(want))
    return float(np.linalg.norm(got - want)) / (whole or 1.0)


def total_distance(got: Deltas, want: Deltas) -> float:
    """‖got − want‖ / ‖want‖ over all modules together."""
    assert set(got) == set(want)
    lost = sum(float(np.linalg.norm(got[n] - want[n])) ** 2 for n in want)
    whole = sum(float(np.linalg.norm(d)) ** 2 for d in want.values())
    return math.sqrt(lost / (whole or 1.0))


def best(matrix: Array, rank: int) -> Array:
    """Return the closest matrix of a rank (Eckart–Young)."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    truncated: Array = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return truncated
