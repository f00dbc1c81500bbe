"""Adapters by real PEFT on tiny models, and what the live model answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import placed_models
from placed_reference import fused
from safetensors.numpy import save_file

from loratools.base.placement import Placements
from loratools_formats.core.dtypes import Array

WARNINGS = (
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning",
    "ignore:Model with `tie_word_embeddings=True` and the:UserWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:fan_in_fan_out is set to (True|False) but the target module:UserWarning",
    "ignore:You have requested `ensure_weight_tying`, but no tied modules:UserWarning",
    # It takes the biases of lora_B for factors.
    "ignore:Adapter 'default':UserWarning",
    # It makes these patterns itself when it stacks experts.
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)
"""What PEFT says whenever the option in question is used at all."""


class Answers(NamedTuple):
    """Logits of the live adapter, of the fused checkpoint and of the bare base."""

    live: Array
    fused: Array
    bare: Array

    def agree(self) -> bool:
        assert np.abs(self.live - self.bare).max() > 0.1, "the adapter shows"
        return bool(np.abs(self.live - self.fused).max() < 1e-12)


def save_base(model: Any, folder: Path) -> Path:
    """Save a model as its class does, in float64."""
    model.save_pretrained(folder)
    return folder


def save_as_held(model: Any, folder: Path) -> Path:
    """Save a model under the names it has in memory: stacked experts stay stacked."""
    model.config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    tensors = {k: v.numpy().copy() for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_adapter(
    name: str, folder: Path, prepare: Callable[[Any], None] | None = None, **config: Any
) -> Any:
    """Save an adapter of random values by PEFT; return the live model it was saved from."""
    import torch
    from peft import LoraConfig, get_peft_model

    base = placed_models.build(name)
    if prepare is not None:
        prepare(base)
    model = get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 5, **config})).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                if "lora_magnitude_vector" in key:
                    parameter.mul_(1 + 0.3 * noise)
                else:
                    parameter.copy_(0.4 * noise)
    resized = prepare is not None
    model.save_pretrained(str(folder), save_embedding_layers=True if resized else "auto")
    return model.eval()


def loaded_adapter(name: str, folder: Path, prepare: Callable[[Any], None] | None = None) -> Any:
    """Return PEFT's live model of a folder."""
    from peft import PeftModel

    base = placed_models.build(name)
    if prepare is not None:
        prepare(base)
    return PeftModel.from_pretrained(base, str(folder)).double().eval()


def load(name: str, folder: Path) -> Any:
    """Load a checkpoint with the class of a model."""
    import torch

    model = placed_models.build(name)
    experts = getattr(model.config, "_experts_implementation", None)
    options = {} if experts is None else {"experts_implementation": experts}
    return type(model).from_pretrained(folder, dtype=torch.float64, **options).eval()


def logits(model: Any) -> Array:
    import torch

    with torch.no_grad():
        return model(**placed_models.inputs()).logits.numpy().copy()


def compared(
    name: str, work: Path, prepare: Callable[[Any], None] | None = None, **config: Any
) -> tuple[Answers, Placements]:
    """Fuse an adapter into the checkpoint its base's class saves, and load both."""
    base = save_base(placed_models.build(name), work / "base")
    save_adapter(name, work / "adapter", prepare, **config)
    placements = fused(base, work / "adapter", work / "fused")
    live = loaded_adapter(name, work / "adapter", prepare)
    answers = Answers(
        logits(live), logits(load(name, work / "fused")), logits(placed_models.build(name))
    )
    return answers, placements


def write_adapter(folder: Path, modules: dict[str, tuple[int, int]], **config: Any) -> Path:
    """Write an adapter by hand, with modules of (out, in), where PEFT would name them otherwise."""
    rng = np.random.default_rng(3)
    tensors = {}
    for path, (out, in_) in modules.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = rng.standard_normal((3, in_))
        tensors[f"base_model.model.{path}.lora_B.weight"] = rng.standard_normal((out, 3))
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 5,
        "target_modules": sorted({path.rpartition(".")[2] for path in modules}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def copy_config(source: Path, target: Path, **values: Any) -> None:
    """Copy a configuration with some of its values changed."""
    target.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
