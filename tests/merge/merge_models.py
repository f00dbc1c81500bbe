"""Small base models, and adapters for them saved by PEFT, with what PEFT itself makes of them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from loratools_formats.core.dtypes import Array

Changes = dict[str, Array]

DORA_KINDS = ["linear", "conv1d", "conv", "embedding"]
KINDS = [*DORA_KINDS, "experts"]


def base_model(kind: str) -> Any:
    """Return a fresh model, always with the same weights."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = {
            "linear": lambda: {"up": nn.Linear(12, 20), "down": nn.Linear(20, 7, bias=False)},
            "conv1d": lambda: {"c_fc": Conv1D(20, 12), "c_proj": Conv1D(12, 20)},
            "conv": lambda: {"wide": nn.Conv2d(3, 8, (3, 2)), "point": nn.Conv2d(8, 6, 1)},
            "embedding": lambda: {"embed": nn.Embedding(23, 12), "head": nn.Linear(12, 5)},
            "experts": lambda: {"router": nn.Linear(6, 6), "experts": _experts()},
        }[kind]()
        return nn.Sequential(OrderedDict(layers)).double()


def _experts() -> Any:
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 10, 6))

        def forward(self, x: Any) -> Any:
            return torch.einsum("ni,eoi->no", x, self.w)

    return Experts()


def _targets(kind: str) -> dict[str, Any]:
    if kind == "experts":
        return {"target_modules": ["router"], "target_parameters": ["experts.w"]}
    names = [name for name, _ in base_model(kind).named_children()]
    return {"target_modules": names, "fan_in_fan_out": kind == "conv1d"}


def saved_by_peft(folder: Path, kind: str, seed: int, **config: Any) -> tuple[Path, Changes]:
    """Save an adapter of random values by PEFT; return its folder, and its changes by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        base_model(kind), LoraConfig(**{"r": 4, "lora_alpha": 6} | _targets(kind) | config)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(0.3 * noise)
    model.save_pretrained(folder)
    return folder, changes(model, kind)


def loaded_by_peft(folder: Path, kind: str) -> Changes:
    """Return the changes of an adapter by PEFT, which has to find a place for every tensor."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base_model(kind), str(folder)).double()
    return changes(model, kind)


def changes(model: Any, kind: str) -> Changes:
    """Return what PEFT adds to each weight, as (out, in)."""
    before, after = base_model(kind).state_dict(), model.merge_and_unload().state_dict()
    found = {}
    for name, old in before.items():
        if not name.endswith(".bias"):
            change = (after[name] - old).numpy()
            crossed = kind == "conv1d" or name == "embed.weight"
            flat = change if change.ndim == 3 else change.reshape(len(change), -1)
            found[name.rpartition(".")[0]] = flat.T if crossed else flat
    return found


def saved_base(folder: Path, kind: str) -> Path:
    """Write a base model as a checkpoint."""
    folder.mkdir()
    tensors = {name: value.numpy().copy() for name, value in base_model(kind).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
