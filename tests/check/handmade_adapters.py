"""Small PEFT folders for the rules of `check`, each with one thing wrong."""

import json

import numpy as np
from safetensors.numpy import save_file

MODULES = tuple(f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj"))
RANK, IN, OUT = 4, 8, 12
CARD = """---
base_model: org/base
base_model_relation: adapter
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags: [lora]
---
# An adapter
"""
CONFIG = {
    "base_model_name_or_path": "org/base", "bias": "none", "lora_alpha": 8, "peft_type": "LORA",
    "peft_version": "0.21.2", "r": RANK, "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}  # fmt: skip


def tensors(modules=MODULES, rank=RANK, dtype=np.float32, seed=1):
    """Return the factors of modules under PEFT's names."""
    random = np.random.default_rng(seed)
    found = {}
    for name in modules:
        found[f"base_model.model.{name}.lora_A.weight"] = random.normal(size=(rank, IN))
        found[f"base_model.model.{name}.lora_B.weight"] = random.normal(size=(OUT, rank))
    return {key: array.astype(dtype) for key, array in found.items()}


def folder(path, weights=None, card=CARD, without=(), **config):
    """Write an adapter and return its folder."""
    path.mkdir(parents=True, exist_ok=True)
    values = {key: value for key, value in (CONFIG | config).items() if key not in without}
    (path / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors() if weights is None else weights, path / "adapter_model.safetensors")
    if card is not None:
        (path / "README.md").write_text(card)
    return path


def base(path, *, shape=(OUT, IN), modules=MODULES, card=None, **config):
    """Write a base model and return its folder."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {f"{name}.weight": np.ones(shape, np.float32) for name in modules}
    weights["model.embed_tokens.weight"] = np.ones((16, IN), np.float32)
    save_file(weights, path / "model.safetensors")
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16,
              "tie_word_embeddings": True}  # fmt: skip
    (path / "config.json").write_text(json.dumps(values | config))
    if card is not None:
        (path / "README.md").write_text(card)
    return path
