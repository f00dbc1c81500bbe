"""Fused checkpoints beside PEFT: a base saved, fused by the command, and loaded again.

Bases of transformers are saved and loaded by transformers; toys are a bare state dict. Both are in
float32, so what is stored differs from PEFT's arithmetic in float64 by one rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft_oracle
from click.testing import CliRunner
from peft_cases import Case

from loratools.cli import cli

ROUNDING = 6e-8
"""Relative error of a tensor of float32 rounded once from float64: at most 2^-24."""


def save_base(folder: Path, model: Any) -> Path:
    """Save a base in its own type; tied tensors once."""
    from safetensors.torch import save_model

    if hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder))
    else:
        folder.mkdir(parents=True)
        save_model(model, str(folder / "model.safetensors"))
    return folder


def fuse(*arguments: Any) -> str:
    """Run the command and return what it printed; it must succeed."""
    done = CliRunner().invoke(cli, ["fuse", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def load(folder: Path, case: Case) -> Any:
    """Return the model of a fused checkpoint in float64, as its own library loads it."""
    import torch
    from safetensors.torch import load_model

    model = peft_oracle.fresh(case)
    if not hasattr(model, "save_pretrained"):
        load_model(model, str(folder / "model.safetensors"))
        return model.double().eval()
    options = {"attn_implementation": "eager"}
    if "experts" in str(model.config):
        options["experts_implementation"] = "eager"
    found, info = type(model).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.double().eval()
