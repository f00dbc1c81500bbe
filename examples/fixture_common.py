"""Helpers shared by the scripts that make the example fixtures."""

from __future__ import annotations

import json
import os
import random
import shutil
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from peft import PeftModel

THREADS = 2


def make_deterministic(seed: int, threads: int = THREADS) -> None:
    """Seed every generator in use and ask torch for deterministic kernels."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(mode=True)


def fresh_directory(path: Path) -> Path:
    """Return `path` as an empty directory, removing what an older run left."""
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def save_adapter(model: PeftModel, out: Path, base_name: str, card: str) -> None:
    """Save the active adapter in bf16, with a sorted config and a short card.

    PEFT keeps module names in sets and writes them in arbitrary order, so the
    lists of the config are sorted here to make the output reproducible.
    """
    fresh_directory(out)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.to(torch.bfloat16)
    model.save_pretrained(str(out), safe_serialization=True, save_embedding_layers=False)
    config_path = out / "adapter_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card, encoding="utf-8")
