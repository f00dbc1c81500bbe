"""Small live models of every kind of layer, with factors that are not zero."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.square, self.down = nn.Linear(20, 24), nn.Linear(24, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.down(torch.tanh(self.square(torch.tanh(self.up(x)))))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.square, self.down = Conv1D(24, 20), Conv1D(24, 24), Conv1D(16, 24)

    forward = Linears.forward


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv2d(12, 20, 3, padding=1)
        self.square = nn.Conv2d(20, 20, 1)
        self.down = nn.Conv2d(20, 10, (2, 3))

    forward = Linears.forward


class Lines(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.square = nn.Conv1d(12, 20, 3, stride=2), nn.Conv1d(20, 20, 1)
        self.down = nn.Conv1d(20, 10, 2)

    forward = Linears.forward


class Solids(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Conv3d(6, 12, 2), nn.Conv3d(12, 8, 2)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.square = nn.Embedding(30, 16), nn.Embedding(30, 16)
        self.down = nn.Linear(16, 20)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x) + self.square(x)))


def inputs(model_class, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if model_class is Embeddings:
        return torch.randint(0, 30, (count, 7), generator=generator)
    shape = {
        Convolutions: (12, 6, 6),
        Lines: (12, 15),
        Solids: (6, 4, 4, 4),
    }.get(model_class, (20,))
    return torch.randn(count, *shape, generator=generator)


CASES = {
    "linear": (Linears, {}),
    "linear, bf16": (Linears, {"dtype": torch.bfloat16}),
    "linear, f16": (Linears, {"dtype": torch.float16}),
    "linear, f64": (Linears, {"dtype": torch.float64}),
    "rslora": (Linears, {"use_rslora": True, "lora_alpha": 7}),
    "patterns": (
        Linears,
        {"rank_pattern": {"up": 10, "square": 6}, "alpha_pattern": {"down": 3.5}},
    ),
    "rslora, patterns": (
        Linears,
        {"use_rslora": True, "rank_pattern": {"up": 10}, "alpha_pattern": {"square": 5}},
    ),
    "dora": (Linears, {"use_dora": True}),
    "lora_bias": (Linears, {"lora_bias": True}),
    "modules_to_save": (Linears, {"target_modules": ["up", "square"], "modules_to_save": ["down"]}),
    "Conv1D": (Transposed, {"fan_in_fan_out": True}),
    "Conv1D, dora": (Transposed, {"fan_in_fan_out": True, "use_dora": True}),
    "convolution": (Convolutions, {}),
    "convolution, dora": (Convolutions, {"use_dora": True}),
    "one dimension": (Lines, {}),
    "three dimensions": (Solids, {"target_modules": ["up", "down"]}),
    "embedding": (Embeddings, {}),
    "embedding, dora": (Embeddings, {"use_dora": True}),
}


def make(model_class, *, seed=0, dtype=torch.float32, decay=0.7, **config):
    """Return a PEFT model whose changes have falling singular values."""
    torch.manual_seed(seed)
    base = model_class().to(dtype)
    given = {"r": 8, "lora_alpha": 12, "target_modules": ["up", "square", "down"], **config}
    model = get_peft_model(base, LoraConfig(**given), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" not in name or "magnitude" in name:
                continue
            p.copy_(0.4 * torch.randn(p.shape))
            if name.endswith(("lora_A.default.weight", "lora_embedding_A.default")):
                p.mul_((decay ** torch.arange(len(p))).reshape(-1, *[1] * (p.ndim - 1)))
    return model


def deltas(model):
    """Return ΔW of each layer as PEFT gives it, in float64, and the dense form of a convolution."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            wide = {n: p.data for n, p in module.named_parameters() if "lora_" in n}
            for n, p in module.named_parameters():
                if n in wide:
                    p.data = p.data.double()
            found[name] = module.get_delta_weight("default").detach().numpy().astype(np.float64)
            for n, p in module.named_parameters():
                if n in wide:
                    p.data = wide[n]
    return found
