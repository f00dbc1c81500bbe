"""Adapters of every kind that PEFT can create, with random weights, and the change PEFT merges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


class Net(nn.Module):
    """Linear layers of three shapes, one without bias."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 48)
        self.down = nn.Linear(48, 24, bias=False)
        self.sq = nn.Linear(24, 24)

    def forward(self, x):
        return self.sq(self.down(torch.relu(self.up(x))))


class ConvNet(nn.Module):
    """Two-dimensional convolutions."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(6, 8, 3)
        self.point = nn.Conv2d(8, 6, 1)

    def forward(self, x):
        return self.point(self.wide(x))


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        name: of the test.
        config: name of PEFT's configuration class.
        options: its arguments.
        kind: what ours is called.
        exact: whether it folds exactly.
        base: whether the fold needs the base.
        model: the network.
        targets: the modules.
    """

    name: str
    config: str
    options: dict[str, Any]
    kind: str
    exact: bool
    base: bool
    model: type[nn.Module] = Net
    targets: tuple[str, ...] = ("up", "down", "sq")
    noise: float = 0.1
    fields: dict[str, Any] = field(default_factory=dict)


def _conv(name, config, options, kind, exact, base):
    return Case(name, config, options, kind, exact, base, ConvNet, ("wide", "point"))


CASES = [
    Case("adalora", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9}, "adalora", True, False),
    Case("loha", "LoHaConfig", {"r": 3, "alpha": 5}, "loha", True, False),
    Case("loha-patterns", "LoHaConfig", {"r": 3, "alpha": 5, "rank_pattern": {"up": 2}, "alpha_pattern": {"s.": 9}}, "loha", True, False),
    Case("loha-high-rank", "LoHaConfig", {"r": 8, "alpha": 5}, "loha", True, False),
    Case("lokr", "LoKrConfig", {"r": 8, "alpha": 5}, "lokr", True, False),
    Case("lokr-small", "LoKrConfig", {"r": 2, "alpha": 5, "decompose_both": True, "decompose_factor": 4}, "lokr", True, False),
    _conv("loha-conv", "LoHaConfig", {"r": 3, "use_effective_conv2d": True}, "loha", True, True),
    _conv("loha-conv-flat", "LoHaConfig", {"r": 3}, "loha", True, True),
    _conv("lokr-conv", "LoKrConfig", {"r": 8}, "lokr", True, True),
    _conv("lokr-conv-tucker", "LoKrConfig", {"r": 1, "use_effective_conv2d": True, "decompose_factor": 2}, "lokr", True, True),
    Case("vera", "VeraConfig", {"r": 6}, "vera", True, True),
    Case("vera-seeded", "VeraConfig", {"r": 6, "save_projection": False, "projection_prng_key": 77}, "vera", True, True),
    Case("pvera", "PveraConfig", {"r": 6}, "vera", True, True),
    Case("pvera-seeded", "PveraConfig", {"r": 6, "save_projection": False}, "vera", True, True),
    Case("vblora", "VBLoRAConfig", {"num_vectors": 10, "vector_length": 6}, "vblora", True, False),
    Case("vblora-topk", "VBLoRAConfig", {"num_vectors": 10, "vector_length": 6, "save_only_topk_weights": True, "topk": 3}, "vblora", True, False),
    Case("unilora", "UniLoraConfig", {"r": 3, "save_indices": True}, "unilora", True, False),
    Case("tinylora", "TinyLoraConfig", {"r": 2, "u": 8}, "tinylora", True, False),
    Case("tinylora-tied", "TinyLoraConfig", {"r": 2, "u": 8, "weight_tying": 1.0}, "tinylora", True, False),
    Case("delora", "DeloraConfig", {"r": 3}, "delora", True, False),
    Case("gralora", "GraloraConfig", {"r": 4, "gralora_k": 2}, "gralora", True, False),
    Case("gralora-hybrid", "GraloraConfig", {"r": 4, "gralora_k": 2, "hybrid_r": 2}, "gralora", True, False),
    Case("miss", "MissConfig", {"r": 5}, "miss", True, True),
    Case("miss-mini", "MissConfig", {"r": 5, "mini_r": 4, "init_weights": "mini"}, "miss", True, True),
    Case("miss-bat", "MissConfig", {"r": 4, "init_weights": "bat"}, "miss_bat", False, True),
    Case("c3a", "C3AConfig", {"block_size": 12}, "c3a", False, False),
    Case("randlora", "RandLoraConfig", {"r": 5}, "randlora", False, True),
    Case("randlora-seeded", "RandLoraConfig", {"r": 5, "save_projection": False}, "randlora", False, True),
    Case("randlora-sparse", "RandLoraConfig", {"r": 5, "save_projection": False, "sparse": True}, "randlora", False, True),
    Case("randlora-very-sparse", "RandLoraConfig", {"r": 5, "save_projection": False, "very_sparse": True}, "randlora", False, True),
    Case("fourierft", "FourierFTConfig", {"n_frequency": 50}, "fourierft", False, True),
    Case("waveft-db1", "WaveFTConfig", {"n_frequency": 50}, "waveft", False, True),
    Case("waveft-db4", "WaveFTConfig", {"n_frequency": 50, "wavelet_family": "db4"}, "waveft", False, True),
    Case("waveft-direct", "WaveFTConfig", {"n_frequency": 50, "use_idwt": False}, "waveft", False, True),
    Case("shira", "ShiraConfig", {"r": 2}, "sparse", False, True),
    Case("supertuning", "SupertuningConfig", {}, "sparse", False, True),
    Case("supra", "SupertuningConfig", {"r": 3, "lora_alpha": 6}, "sparse", False, True),
    Case("oft", "OFTConfig", {"oft_block_size": 4, "r": 0}, "oft", False, True),
    Case("oft-cayley-shared", "OFTConfig", {"oft_block_size": 6, "r": 0, "use_cayley_neumann": False, "block_share": True}, "oft", False, True),
    Case("coft", "OFTConfig", {"oft_block_size": 4, "r": 0, "coft": True, "eps": 0.3}, "oft", False, True),
    _conv("oft-conv", "OFTConfig", {"oft_block_size": 2, "r": 0}, "oft", False, True),
    Case("boft", "BOFTConfig", {"boft_block_size": 4}, "boft", False, True),
    _conv("boft-conv", "BOFTConfig", {"boft_block_size": 2}, "boft", False, True),
    Case("hra", "HRAConfig", {"r": 3}, "hra", True, True),
    Case("hra-gs", "HRAConfig", {"r": 3, "apply_GS": True}, "hra", True, True),
    _conv("hra-conv", "HRAConfig", {"r": 3}, "hra", True, True),
    Case("road-1", "RoadConfig", {"group_size": 8}, "road", False, True),
    Case("road-2", "RoadConfig", {"group_size": 8, "variant": "road_2"}, "road", False, True),
    Case("road-4", "RoadConfig", {"group_size": 8, "variant": "road_4"}, "road", False, True),
    Case("ia3", "IA3Config", {"feedforward_modules": ["down"]}, "ia3", False, True),
    Case("hira", "HiraConfig", {"r": 3}, "hira", False, True),
    _conv("hira-conv", "HiraConfig", {"r": 3}, "hira", False, True),
    Case("glora", "GloraConfig", {"r": 3}, "glora", False, True),
    Case("glora-vector", "GloraConfig", {"r": 3, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}, "glora", False, True),
    Case("deft", "DeftConfig", {"r": 3}, "deft", True, True),
    Case("deft-qr", "DeftConfig", {"r": 3, "decomposition_method": "qr", "alpha": 6}, "deft", True, True),
    Case("para", "DeftConfig", {"r": 3, "para": True}, "deft", True, True),
    Case("psoft", "PsoftConfig", {"r": 5}, "psoft", True, True),
    Case("psoft-neumann", "PsoftConfig", {"r": 5, "use_cayley_neumann": True, "ab_svd_init": "pissa_init"}, "psoft", True, True),
    Case("psoft-free", "PsoftConfig", {"r": 5, "psoft_orth": False}, "psoft", True, True),
    Case("osf", "OSFConfig", {"effective_rank": 20}, "osf", False, True),
    Case("frod", "FrodConfig", {"progressbar": False}, "frod", False, True),
    Case("kasa", "LoraConfig", {"r": 3, "kasa_config": "KasaConfig"}, "kasa", True, True),
    Case("bdlora", "LoraConfig", {"r": 4, "use_bdlora": "BdLoraConfig"}, "blockdiag", True, False),
]  # fmt: skip


def make(case, folder):
    """Save the base and a random adapter; returns (weight, bias) changes by module, in float64."""
    import peft

    torch.manual_seed(sum(map(ord, case.name)))
    model = case.model()
    folder.mkdir(parents=True, exist_ok=True)
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    from safetensors.torch import save_file

    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    options = dict(case.options)
    if options.get("kasa_config"):
        options["kasa_config"] = peft.KasaConfig()
    if options.get("use_bdlora"):
        from peft.tuners.lora.config import BdLoraConfig

        options["use_bdlora"] = BdLoraConfig(
            target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2, match_strict=False
        )
    config = getattr(peft, case.config)(target_modules=list(case.targets), **options)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * case.noise
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    return {name: (merged[name].double() - base[name].double()).numpy() for name in base}
