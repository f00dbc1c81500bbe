"""Checkpoints of several shards and adapters for them, and what folders hold."""

import json
import os

import numpy as np
from safetensors.numpy import save_file

RANK = 8
INDEX = "model.safetensors.index.json"


def linear(layer):
    return f"model.layers.{layer}.mlp.up_proj"


def sharded(folder, tensors, shards=3):
    """Write a checkpoint of several shards, with an index, a config and a tokenizer."""
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: tensors[name] for name in names[number::shards]}
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    size = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "float16"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def adapter(folder, layers, hidden):
    rng = np.random.default_rng(1)
    tensors = {}
    for layer in range(layers):
        prefix = f"base_model.model.{linear(layer)}.lora_"
        shapes = {"A": (RANK, hidden), "B": (hidden, RANK)}
        tensors |= {
            f"{prefix}{letter}.weight": rng.standard_normal(shape).astype("f4") * 0.05
            for letter, shape in shapes.items()
        }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def weights(layers, hidden):
    rng = np.random.default_rng(0)
    found = {
        f"{linear(layer)}.weight": rng.standard_normal((hidden, hidden)).astype("f2")
        for layer in range(layers)
    }
    return found | {"model.norm.weight": np.ones(hidden, "f2")}


def state(folder):
    """Return name, type, bytes and time of change of everything in a folder."""
    return {
        str(path.relative_to(folder)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() and not path.is_symlink() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def content(folder):
    if not folder.exists():
        return None
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "provenance.json"}


def hollow(folder, layers, hidden):
    """Write a base of zeros that takes no space on the disk, one shard for every four layers."""
    folder.mkdir()
    weight_map = {}
    for first in range(0, layers, 4):
        file = f"model-{first:05d}.safetensors"
        held = range(first, min(first + 4, layers))
        nbytes = hidden * hidden * 2
        entries = {
            f"{linear(layer)}.weight": {
                "dtype": "BF16",
                "shape": [hidden, hidden],
                "data_offsets": [i * nbytes, (i + 1) * nbytes],
            }
            for i, layer in enumerate(held)
        }
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(folder / file, 8 + len(header) + len(held) * nbytes)
        weight_map |= dict.fromkeys(entries, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
