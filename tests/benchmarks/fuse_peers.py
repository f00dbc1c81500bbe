"""What others do to fuse an adapter without a model, as a whole command.

- `all` loads every tensor of the checkpoint, adds the changes, and saves all of it.
- `shards` does the same one shard after the other.

Both add in float32 and round once, with torch in its default threads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def changes(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the factors, scale · b and a, by base tensor."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    found = {}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 - it is no mapping
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
                b = tensors.get_tensor(key.replace(".lora_A.", ".lora_B.")).float()
                found[name] = (scale * b, tensors.get_tensor(key).float())
    return found


def fuse(
    tensors: dict[str, torch.Tensor], factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Add the changes to those tensors that have one."""
    for name, (b, a) in factors.items():
        if name in tensors:
            tensors[name] = torch.addmm(tensors[name].float(), b, a).bfloat16()


def main() -> None:
    """Fuse by one method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["all", "shards"])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    factors = changes(arguments.adapter)
    arguments.out.mkdir()
    files = sorted(arguments.base.glob("*.safetensors"))
    loaded = {}
    for file in files:
        if arguments.method == "all":
            loaded[file.name] = load_file(file)
        else:
            tensors = load_file(file)
            fuse(tensors, factors)
            save_file(tensors, arguments.out / file.name, metadata={"format": "pt"})
    for name, tensors in loaded.items():
        fuse(tensors, factors)
        save_file(tensors, arguments.out / name, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
