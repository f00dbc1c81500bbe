"""Make many small adapters, each with numbers of its own.

python small_adapters.py FOLDER COUNT MODULES WIDTH RANK
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


def main() -> None:
    """Write the adapters that are not there yet."""
    root, (count, modules, width, rank) = Path(sys.argv[1]), map(int, sys.argv[2:])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q"]}
    for number in range(count):
        place = root / f"adapter-{number:05}"
        if (place / "adapter_config.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        tensors = {}
        for module in range(modules):
            name = f"base_model.model.layers.{module}.q"
            for part, shape in (("lora_A", (rank, width)), ("lora_B", (width, rank))):
                values = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
                tensors[f"{name}.{part}.weight"] = values
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        (place / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
