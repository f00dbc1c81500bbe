"""Small fleets of adapters of one base, whose weight changes lie in common spaces to a degree."""

import json

import numpy as np
from safetensors.numpy import save_file

MODULES = {
    "layers.0.self_attn.q_proj": (24, 20),
    "layers.0.mlp.down_proj": (16, 28),
    "layers.1.self_attn.q_proj": (24, 20),
}
PREFIX = "base_model.model."


def matrices(count, *, rank=3, common=6, noise=0.2, seed=0, modules=None):
    """Return {module: (b, a)} of each adapter: parts of a common space, and noise."""
    rng = np.random.default_rng(seed)
    fleet = [{} for _ in range(count)]
    for name, (out, in_) in (modules or MODULES).items():
        left, right = rng.standard_normal((out, common)), rng.standard_normal((common, in_))
        for one in fleet:
            b = left @ rng.standard_normal((common, rank)) + noise * rng.standard_normal(
                (out, rank)
            )
            a = rng.standard_normal((rank, common)) @ right + noise * rng.standard_normal(
                (rank, in_)
            )
            one[name] = (b, a)
    return fleet


def write(folder, factors, *, dtype=np.float32, extra=None, **config):
    """Write a PEFT folder whose ΔW = b @ a, with scale 2 divided out of b; return its path."""
    tensors = dict(extra or {})
    for name, (b, a) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.asarray(a).astype(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (np.asarray(b) / 2.0).astype(dtype)
    rank = max(len(a) for _, a in factors.values())
    values = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(factors),
        "base_model_name_or_path": "somebody/base",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def fleet(folder, count, *, dtype=np.float32, seed=0, **shape):
    """Write a fleet and return its paths."""
    made = matrices(count, seed=seed, **shape)
    return [write(folder / f"adapter-{i}", one, dtype=dtype) for i, one in enumerate(made)]
