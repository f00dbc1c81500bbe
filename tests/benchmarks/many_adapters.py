"""Make many small adapters with the names of a 7B Llama: what their headers cost to check.

    python many_adapters.py FOLDER COUNT

Each has a configuration, 448 tensors of rank 4 in widths of 8, and a model card.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from synthetic import SHAPES

CARD = (
    """---
base_model: synthetic/llama-7b-shapes
base_model_relation: adapter
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags: [lora]
---
# An adapter
"""
    + 40 * "It says a word or two about how it was made.\n"
)


def main() -> None:
    """Write the first adapter and copy it."""
    root, count = Path(sys.argv[1]), int(sys.argv[2])
    first = root / "adapter-0000"
    first.mkdir(parents=True)
    tensors = {}
    for layer in range(32):
        for name in SHAPES:
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = np.ones((4, 8), np.float16)
            tensors[f"{prefix}.lora_B.weight"] = np.ones((8, 4), np.float16)
    save_file(tensors, first / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": "synthetic/llama-7b-shapes", "lora_alpha": 8,
        "peft_type": "LORA", "peft_version": "0.21.2", "r": 4,
        "target_modules": sorted(name.rpartition(".")[2] for name in SHAPES),
    }  # fmt: skip
    (first / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (first / "README.md").write_text(CARD)
    for number in range(1, count):
        shutil.copytree(first, root / f"adapter-{number:04}")


if __name__ == "__main__":
    main()
