"""Make a small LoRA in kohya's form, with the module names of FLUX.1 and random weights.

It is not trained: it shows names and shapes, and has a spectrum that decays as real ones do. Needs
numpy, ml_dtypes and safetensors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HIDDEN = 32
RANK = 16
ALPHA = 8.0
MODULES = {
    "double_blocks_{}_img_attn_qkv": (3, 1),
    "double_blocks_{}_img_attn_proj": (1, 1),
    "double_blocks_{}_img_mlp_0": (4, 1),
    "single_blocks_{}_linear1": (7, 1),
    "single_blocks_{}_linear2": (1, 5),
}
METADATA = {
    "ss_base_model_version": "flux1",
    "ss_network_module": "networks.lora_flux",
    "ss_network_dim": str(RANK),
    "ss_network_alpha": str(ALPHA),
    "ss_tag_frequency": json.dumps({"holiday": {"somebody on a beach": 12}}),
    "modelspec.title": "tiny-flux",
}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny-flux")
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    tensors = {}
    for block in range(2):
        for name, (height, width) in MODULES.items():
            start = f"lora_unet_{name.format(block)}"
            decay = np.arange(1, RANK + 1) ** -1.0
            down = rng.standard_normal((RANK, width * HIDDEN)) * 0.1
            up = rng.standard_normal((height * HIDDEN, RANK)) * 0.1 * decay
            tensors[f"{start}.lora_down.weight"] = down.astype(ml_dtypes.bfloat16)
            tensors[f"{start}.lora_up.weight"] = up.astype(ml_dtypes.bfloat16)
            tensors[f"{start}.alpha"] = np.array(ALPHA, np.float32)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "kohya.safetensors", METADATA)
    print(f"wrote {out / 'kohya.safetensors'}")


if __name__ == "__main__":
    main()
