"""Make a sharded checkpoint with the shapes of a 1.1B Llama in bfloat16, and an adapter for it.

Eleven layers are about 1 GB. Every layer has the same values, which nothing here can notice. The
adapter is of rank 16, on all seven linears, and about as large beside the weights as trained ones.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN, KEY_VALUE, INNER = 2048, 256, 5632
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
RANK = 16
LAYERS_PER_SHARD = 4
BF16 = ml_dtypes.bfloat16


def make_base(out: Path, layers: int, seed: int = 0) -> None:
    """Write the checkpoint folder, config.json last."""
    rng = np.random.default_rng(seed)
    one: dict[str, Any] = {
        f"{name}.weight": (0.02 * rng.standard_normal(shape, dtype=np.float32)).astype(BF16)
        for name, shape in SHAPES.items()
    }
    one |= {
        f"{name}.weight": np.ones(HIDDEN, BF16)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    write_layers(out, layers, one, {})


def write_layers(
    out: Path, layers: int, one: Mapping[str, Any], config: Mapping[str, Any], form: str = "pt"
) -> None:
    """Write a sharded folder whose layers all have the same tensors, config.json last.

    Args:
        out: the folder.
        layers: how many.
        one: tensors of a layer, by their names in it.
        config: what config.json has beside what all Llamas have.
        form: what the files' metadata says.
    """
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
        save_file(held, out / file, metadata={"format": form})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    of_llama = {"model_type": "llama", "dtype": "bfloat16", "num_hidden_layers": layers}
    (out / "config.json").write_text(json.dumps({**of_llama, **config}))


def make_adapter(out: Path, layers: int, seed: int = 1) -> None:
    """Write the adapter folder, adapter_config.json last."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            for letter, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                values = 0.02 * rng.standard_normal(shape, dtype=np.float32)
                tensors[f"{prefix}.lora_{letter}.weight"] = values.astype(BF16)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted(name.rpartition(".")[2] for name in SHAPES),
        "base_model_name_or_path": "synthetic/llama-1b-shapes",
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(make: Callable[[Path, int], None] = make_base, layers: int | None = None) -> None:
    """Parse the command line and make both.

    Args:
        make: writes the base.
        layers: how many by default; None to ask for a number.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--layers", type=int, default=layers, required=layers is None)
    arguments = parser.parse_args()
    make(arguments.base, arguments.layers)
    make_adapter(arguments.adapter, arguments.layers)


if __name__ == "__main__":
    main()
