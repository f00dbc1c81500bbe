"""Adapters of every kind that PEFT can create, with random weights, and the change PEFT merges."""

from __future__ import annotations

from dataclasses import dataclass
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


class Conv1dNet(nn.Module):
    """A one-dimensional convolution."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv1d(6, 8, 3)

    def forward(self, x):
        return self.wide(x)


class EmbeddingNet(nn.Module):
    """An embedding."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 24)

    def forward(self, x):
        return self.embed_tokens(x)


MODELS = {"conv": ConvNet, "conv1d": Conv1dNet, "embedding": EmbeddingNet}
TARGETS = {
    Net: ["up", "down", "sq"],
    ConvNet: ["wide", "point"],
    Conv1dNet: ["wide"],
    EmbeddingNet: ["embed_tokens"],
}


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        name: of the test.
        config: name of PEFT's configuration class.
        kind: what ours is called.
        exact: whether it folds exactly.
        base: whether the fold needs the base.
        model: the network.
        options: arguments of the configuration.
    """

    name: str
    config: str
    kind: str
    exact: bool
    base: bool
    model: type[nn.Module]
    options: dict[str, Any]

    @property
    def targets(self):
        """The modules."""
        return self.options.get("target_modules") or TARGETS[self.model]


def case(name, config, words, **options):
    """Return a case from its kind and what else is true of it, in words."""
    kind, *flags = words.split()
    model = next((MODELS[flag] for flag in flags if flag in MODELS), Net)
    return Case(name, config, kind, "exact" in flags, "base" in flags, model, options)


CASES = [
    case("adalora", "AdaLoraConfig", "adalora exact", init_r=4, target_r=2, total_step=9),
    case("loha", "LoHaConfig", "loha exact", r=3, alpha=5),
    case(
        "loha-patterns",
        "LoHaConfig",
        "loha exact",
        r=3,
        alpha=5,
        rank_pattern={"up": 2},
        alpha_pattern={"s.": 9},
    ),
    case("loha-high-rank", "LoHaConfig", "loha exact", r=8, alpha=5),
    case("lokr", "LoKrConfig", "lokr exact", r=8, alpha=5),
    case(
        "lokr-small",
        "LoKrConfig",
        "lokr exact",
        r=2,
        alpha=5,
        decompose_both=True,
        decompose_factor=4,
    ),
    case("loha-conv", "LoHaConfig", "loha exact base conv", r=3, use_effective_conv2d=True),
    case("loha-conv-flat", "LoHaConfig", "loha exact base conv", r=3),
    case("lokr-conv", "LoKrConfig", "lokr exact base conv", r=8),
    case(
        "lokr-conv-tucker",
        "LoKrConfig",
        "lokr exact base conv",
        r=1,
        use_effective_conv2d=True,
        decompose_factor=2,
    ),
    case("vera", "VeraConfig", "vera exact base", r=6),
    case(
        "vera-seeded",
        "VeraConfig",
        "vera exact base",
        r=6,
        save_projection=False,
        projection_prng_key=77,
    ),
    case("pvera", "PveraConfig", "vera exact base", r=6),
    case("pvera-seeded", "PveraConfig", "vera exact base", r=6, save_projection=False),
    case("vblora", "VBLoRAConfig", "vblora exact", num_vectors=10, vector_length=6),
    case(
        "vblora-topk",
        "VBLoRAConfig",
        "vblora exact",
        num_vectors=10,
        vector_length=6,
        save_only_topk_weights=True,
        topk=3,
    ),
    case("unilora", "UniLoraConfig", "unilora exact", r=3, save_indices=True),
    case("unilora-seeded", "UniLoraConfig", "unilora exact base", r=3, theta_d_length=40),
    case("tinylora", "TinyLoraConfig", "tinylora exact", r=2, u=8),
    case("tinylora-few", "TinyLoraConfig", "tinylora exact", r=2, u=1),
    case("tinylora-tied", "TinyLoraConfig", "tinylora exact", r=2, u=8, weight_tying=1.0),
    case("delora", "DeloraConfig", "delora exact", r=3),
    case("gralora", "GraloraConfig", "gralora exact", r=4, gralora_k=2),
    case("gralora-hybrid", "GraloraConfig", "gralora exact", r=4, gralora_k=2, hybrid_r=2),
    case("miss", "MissConfig", "miss exact base", r=5),
    case("miss-mini", "MissConfig", "miss exact base", r=5, mini_r=4, init_weights="mini"),
    case("miss-bat", "MissConfig", "miss_bat base", r=4, init_weights="bat"),
    case("c3a", "C3AConfig", "c3a", block_size=12),
    case("randlora", "RandLoraConfig", "randlora base", r=5),
    case("randlora-seeded", "RandLoraConfig", "randlora base", r=5, save_projection=False),
    case(
        "randlora-sparse",
        "RandLoraConfig",
        "randlora base",
        r=5,
        save_projection=False,
        sparse=True,
    ),
    case(
        "randlora-very-sparse",
        "RandLoraConfig",
        "randlora base",
        r=5,
        save_projection=False,
        very_sparse=True,
    ),
    case("fourierft", "FourierFTConfig", "fourierft base", n_frequency=50),
    case("waveft-db1", "WaveFTConfig", "waveft base", n_frequency=50),
    case("waveft-db4", "WaveFTConfig", "waveft base", n_frequency=50, wavelet_family="db4"),
    case("waveft-sym5", "WaveFTConfig", "waveft base", n_frequency=50, wavelet_family="sym5"),
    case("waveft-coif4", "WaveFTConfig", "waveft base", n_frequency=50, wavelet_family="coif4"),
    case("waveft-direct", "WaveFTConfig", "waveft base", n_frequency=50, use_idwt=False),
    case("shira", "ShiraConfig", "sparse base", r=2),
    case("supertuning", "SupertuningConfig", "sparse base"),
    case("supra", "SupertuningConfig", "sparse base", r=3, lora_alpha=6),
    case("oft", "OFTConfig", "oft base", oft_block_size=4, r=0),
    case(
        "oft-cayley-shared",
        "OFTConfig",
        "oft base",
        oft_block_size=6,
        r=0,
        use_cayley_neumann=False,
        block_share=True,
    ),
    case("coft", "OFTConfig", "oft base", oft_block_size=4, r=0, coft=True, eps=0.3),
    case("oft-conv", "OFTConfig", "oft base conv", oft_block_size=2, r=0),
    case("boft", "BOFTConfig", "boft base", boft_block_size=4),
    case("boft-conv", "BOFTConfig", "boft base conv", boft_block_size=2),
    case("hra", "HRAConfig", "hra exact base", r=3),
    case("hra-gs", "HRAConfig", "hra exact base", r=3, apply_GS=True),
    case("hra-conv", "HRAConfig", "hra exact base conv", r=3),
    case("road-1", "RoadConfig", "road base", group_size=8),
    case("road-2", "RoadConfig", "road base", group_size=8, variant="road_2"),
    case("road-4", "RoadConfig", "road base", group_size=8, variant="road_4"),
    case("ia3", "IA3Config", "ia3 base", feedforward_modules=["down"]),
    case("hira", "HiraConfig", "hira base", r=3),
    case("hira-conv", "HiraConfig", "hira base conv", r=3),
    case("glora", "GloraConfig", "glora base", r=3),
    case(
        "glora-vector",
        "GloraConfig",
        "glora base",
        r=3,
        config_A_B="vector",
        config_C="vector",
        config_D_E="vector",
    ),
    case("deft", "DeftConfig", "deft exact base", r=3),
    case("deft-qr", "DeftConfig", "deft exact base", r=3, decomposition_method="qr", alpha=6),
    case("para", "DeftConfig", "deft exact base", r=3, para=True),
    case("psoft", "PsoftConfig", "psoft exact base", r=5),
    case(
        "psoft-neumann",
        "PsoftConfig",
        "psoft exact base",
        r=5,
        use_cayley_neumann=True,
        ab_svd_init="pissa_init",
    ),
    case("psoft-free", "PsoftConfig", "psoft exact base", r=5, psoft_orth=False),
    case("osf", "OSFConfig", "osf base", effective_rank=20),
    case("frod", "FrodConfig", "frod base", progressbar=False),
    case("lokr-conv1d", "LoKrConfig", "lokr exact base conv1d", r=8),
    case("lokr-conv1d-small", "LoKrConfig", "lokr exact base conv1d", r=1),
    case("adamss", "AdamssConfig", "adamss exact base", r=6, num_subspaces=3, subspace_rank=2),
    case(
        "adamss-dynamic",
        "AdamssConfig",
        "adamss exact base",
        r=9,
        num_subspaces=2,
        subspace_rank=4,
        use_dynamic_rank=True,
        random_seed=5,
    ),
    case("peanut", "PeanutConfig", "peanut exact base", r=5, act_fn="gelu_new"),
    case("peanut-deep", "PeanutConfig", "peanut exact base", r=5, depth=2, scaling=0.5),
    case("beft", "BeftConfig", "bias exact base", target_modules=["up", "sq"]),
    case(
        "tokens",
        "TrainableTokensConfig",
        "token_rows exact base embedding",
        token_indices=[3, 17, 5],
    ),
    case(
        "frod-seeded",
        "FrodConfig",
        "frod base",
        progressbar=False,
        save_projection=False,
        sparse_rate=0.1,
    ),
    case("kasa", "LoraConfig", "kasa exact base", r=3, kasa_config="KasaConfig"),
    case("bdlora", "LoraConfig", "blockdiag exact", r=4, use_bdlora="BdLoraConfig"),
]


def make(case, folder):
    """Save the base and a random adapter; returns (weight, bias) changes by module, in float64."""
    import peft
    from peft.tuners.lora.config import BdLoraConfig
    from safetensors.torch import save_file

    torch.manual_seed(sum(map(ord, case.name)))
    model = case.model()
    folder.mkdir(parents=True, exist_ok=True)
    base = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    (folder / "base").mkdir()
    save_file(base, folder / "base" / "model.safetensors")
    options = dict(case.options)
    if options.get("kasa_config"):
        options["kasa_config"] = peft.KasaConfig()
    if options.get("use_bdlora"):
        options["use_bdlora"] = BdLoraConfig(
            target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2, match_strict=False
        )
    config = getattr(peft, case.config)(**{"target_modules": case.targets, **options})
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    return {name: (merged[name].double() - base[name].double()).numpy() for name in base}
