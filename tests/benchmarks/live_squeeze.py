"""Squeeze a live PEFT model with the shapes of a 7B Llama once, and write what it took."""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from synthetic import SHAPES
from torch import nn

from loratools.training import squeeze_model


class Bare(nn.Linear):
    """A linear layer whose weight takes no memory."""

    def __init__(self, out: int, in_: int) -> None:
        super().__init__(1, 1, bias=False, dtype=torch.bfloat16)
        self.in_features, self.out_features = in_, out
        weight = torch.zeros(1, dtype=torch.bfloat16).expand(out, in_)
        self.weight = nn.Parameter(weight, requires_grad=False)


def make(layers: int) -> torch.nn.Module:
    """Return the model, with factors whose products have falling singular values."""
    base = nn.Module()
    base.layers = nn.ModuleList()
    for _ in range(layers):
        layer = nn.ModuleDict({n.rpartition(".")[2]: Bare(*shape) for n, shape in SHAPES.items()})
        base.layers.append(layer)
    base.forward = lambda x: x
    names = [name.rpartition(".")[2] for name in SHAPES]
    config = LoraConfig(r=64, lora_alpha=128, target_modules=names)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    decay = torch.exp(-4.0 * torch.arange(64) / 64)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.02)
                if "lora_B" in name:
                    p.mul_(decay)
    return model


def main() -> None:
    """Parse the command line, squeeze and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--optimizer", choices=["none", "adamw"], default="none")
    parser.add_argument("--layers", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = make(arguments.layers)
    optimizer = None
    if arguments.optimizer == "adamw":
        factors = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(factors, lr=0.0)
        for p in factors:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    wall, cpu = time.perf_counter(), time.process_time()
    done = squeeze_model(model, rank=16, optimizer=optimizer, workers=1)
    found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = json.dumps({**found, "peak": peak, "relative_error": done.relative_error})
    arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
