"""Bases and PEFT folders put together by hand, and what fusing them must give, in dense float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.fuse.result import FuseResult
from loratools_formats import read_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.core.dtypes import Array

UP = "model.layers.{}.mlp.up_proj"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"


def base(
    folder: Path, shards: dict[str, dict[str, Array]] | dict[str, Array], **config: Any
) -> Path:
    """Write a checkpoint: one file, or several with an index if given by file name."""
    folder.mkdir(parents=True)
    if all(isinstance(value, dict) for value in shards.values()):
        for name, tensors in shards.items():
            save_file(tensors, folder / name, metadata={"format": "pt"})
        listed = {key: name for name, tensors in shards.items() for key in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {"x": 1}, "weight_map": listed}))
    else:
        save_file(shards, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def factors(rng: np.random.Generator, out: int, in_: int, rank: int) -> tuple[Array, Array]:
    """Return b (out, r) and a (r, in) in float32."""
    return (
        rng.standard_normal((out, rank)).astype("f4"),
        rng.standard_normal((rank, in_)).astype("f4"),
    )


def adapter(
    folder: Path,
    modules: dict[str, tuple[Array, Array]],
    extra: dict[str, Array] | None = None,
    **config: Any,
) -> Path:
    """Write a PEFT folder; its scale is lora_alpha / r, 2 / r by default."""
    tensors = {}
    for path, (b, a) in modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    for name, array in (extra or {}).items():
        tensors[f"base_model.model.{name}"] = array
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = next(iter(modules.values()))[1].shape[0] if modules else 1
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": ["x"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def fusion(base_folder: Path, *adapters: Any, **options: Any) -> Fusion:
    """Return a planned fusion of adapters, each a folder or (folder, weight)."""
    inputs = []
    for item in adapters:
        folder, weight = item if isinstance(item, tuple) else (item, 1.0)
        inputs.append(FuseInput(read_adapter(folder), weight, folder.name))
    return Fusion(read_checkpoint(base_folder), inputs, FuseOptions(**options))


def fused(
    out: Path, base_folder: Path, *adapters: Any, **options: Any
) -> tuple[FuseResult, dict[str, Array]]:
    """Fuse; return the report and all tensors, as another library reads them."""
    result = fusion(base_folder, *adapters, **options).write(out)
    return result, tensors(out)


def tensors(folder: Path) -> dict[str, Array]:
    """Return all tensors of a checkpoint."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def exact(w: Array, b: Array, a: Array, scale: float) -> Array:
    """Return W + scale · b @ a in float64."""
    return w.astype(np.float64) + scale * (b.astype(np.float64) @ a.astype(np.float64))


def matrix(seed: int, *shape: int, kind: Any = "f4") -> Array:
    """Return random values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(kind)


def names_in(folder: Path) -> dict[str, list[str]]:
    """Return the names of tensors by file."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "np") as opened:
            found[file.name] = sorted(opened.keys())
    return found
