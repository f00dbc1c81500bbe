"""Makes the golden fixtures of the kinds: `python tests/golden/make_kinds.py [NAME ...]`.

For each kind, `kinds/NAME/` has a tiny adapter, the base where the fold needs one, and the change
that it must have: what PEFT or LyCORIS make of it where they know the kind, else its definition,
written out here. `case.json` says where it comes from, and what the file does not hold.

    adapter/ or adapter.safetensors   as its trainer saves it
    base.safetensors                  only if the fold needs it
    expected.safetensors              MODULE.weight, and MODULE.bias if that changes: what is added
    case.json                         {"source", "format", "settings"}
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

KINDS = Path(__file__).parent / "kinds"

Tensors = dict[str, Any]

# By kind: the class of PEFT's configuration, and its arguments.
OF_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 9}),
    "adamss": ("AdamssConfig", {"r": 4, "num_subspaces": 2, "subspace_rank": 2}),
    "bias": ("BeftConfig", {"target_modules": ["up"]}),
    "blockdiag": ("LoraConfig", {"r": 4, "use_bdlora": "BdLoraConfig"}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 4}),
    "deft": ("DeftConfig", {"r": 3}),
    "delora": ("DeloraConfig", {"r": 3}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "frod": ("FrodConfig", {"progressbar": False}),
    "glora": ("GloraConfig", {"r": 2}),
    "gralora": ("GraloraConfig", {"r": 4, "gralora_k": 2}),
    "hira": ("HiraConfig", {"r": 2}),
    "hra": ("HRAConfig", {"r": 2}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down"]}),
    "kasa": ("LoraConfig", {"r": 3, "kasa_config": "KasaConfig"}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    "miss": ("MissConfig", {"r": 3}),
    "miss_bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0}),
    "osf": ("OSFConfig", {"effective_rank": 4}),
    "peanut": ("PeanutConfig", {"r": 3, "depth": 1}),
    "psoft": ("PsoftConfig", {"r": 4}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "road": ("RoadConfig", {"group_size": 4}),
    "sparse": ("ShiraConfig", {"r": 1}),
    "tinylora": ("TinyLoraConfig", {"r": 2, "u": 8}),
    "token_rows": (
        "TrainableTokensConfig",
        {"target_modules": ["embed_tokens"], "token_indices": [3, 7, 5]},
    ),
    "unilora": ("UniLoraConfig", {"r": 2, "theta_d_length": 20, "save_indices": True}),
    "vblora": ("VBLoRAConfig", {"num_vectors": 6, "vector_length": 4, "topk": 2}),
    "vera": ("VeraConfig", {"r": 4, "save_projection": False}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20, "wavelet_family": "db2"}),
}


def main(names: list[str]) -> None:
    """Write the fixtures of these kinds, or of all."""
    for name in names or [*OF_PEFT, *DEFINED]:
        folder = KINDS / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if name in OF_PEFT:
            _by_peft(name, folder)
        else:
            DEFINED[name](folder)


def case(folder: Path, source: str, expected: Tensors, **more: Any) -> None:
    """Write what a fixture is, and the change that it must have."""
    text = json.dumps({"source": source, **more}, indent=2, ensure_ascii=False)
    (folder / "case.json").write_text(text + "\n")
    save(folder / "expected.safetensors", expected)


def save(path: Path, tensors: Tensors) -> None:
    """Write NumPy arrays as safetensors."""
    from safetensors.numpy import save_file

    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)


def folder_of_peft(folder: Path, tensors: Tensors, **config: Any) -> None:
    """Write a PEFT folder of modules' tensors, for trainers that save one but are not PEFT."""
    (folder / "adapter").mkdir()
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up"], **config}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n")
    named = {f"base_model.model.{key}": value for key, value in tensors.items()}
    save(folder / "adapter" / "adapter_model.safetensors", named)


def random(name: str, *shapes: tuple[int, ...]) -> list[Any]:
    """Return arrays of normal numbers in float32, the same for a name each time."""
    stream = np.random.default_rng([*name.encode()])
    return [stream.standard_normal(shape).astype(np.float32) for shape in shapes]


def _by_peft(name: str, folder: Path) -> None:
    import peft
    import torch
    from peft.tuners.lora.config import BdLoraConfig
    from torch import nn

    torch.manual_seed(sum(map(ord, name)))
    model = nn.Module()
    if name == "token_rows":
        model.embed_tokens = nn.Embedding(10, 12)
    else:
        model.up, model.down = nn.Linear(12, 16), nn.Linear(16, 12, bias=False)
    base = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    config_class, given = OF_PEFT[name]
    options = {"target_modules": ["up", "down"], **given}
    if options.get("kasa_config"):
        options["kasa_config"] = peft.KasaConfig()
    if options.get("use_bdlora"):
        options["use_bdlora"] = BdLoraConfig(
            target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2, match_strict=False
        )
    adapted = peft.get_peft_model(model, getattr(peft, config_class)(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    _sorted(folder / "adapter" / "adapter_config.json")
    merged = adapted.merge_and_unload().state_dict()
    changes = {
        key: (merged[key].double() - base[key].double()).float().numpy()
        for key in base
        if key.rpartition(".")[0] in options["target_modules"]
    }
    changes = {k: v for k, v in changes.items() if k.endswith(".weight") or np.abs(v).max() > 0}
    save(folder / "base.safetensors", {key: tensor.numpy() for key, tensor in base.items()})
    case(folder, f"PEFT {peft.__version__}", changes)


def _sorted(path: Path) -> None:
    """Put a configuration's sets in order, which PEFT writes as they come."""
    values = json.loads(path.read_text())
    if isinstance(values.get("target_modules"), list):
        values["target_modules"].sort()
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _lycoris(folder: Path, module: Any, expected: Any) -> None:
    from importlib.metadata import version

    state = {f"lora_unet_mid.{k}": v.detach().numpy() for k, v in module.state_dict().items()}
    save(folder / "adapter.safetensors", state)
    change = expected.detach().numpy()
    case(folder, f"LyCORIS {version('lycoris-lora')}", {"lora_unet_mid.weight": change})


def _filled(module: Any, seed: int) -> Any:
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def _full(folder: Path) -> None:
    from lycoris.modules.full import FullModule
    from torch import nn

    module = _filled(FullModule("mid", nn.Linear(6, 8)), 1)
    change = module.weight - module.org_weight
    state = {"lora_unet_mid.diff": change.detach().numpy()}
    save(folder / "adapter.safetensors", state)
    case(folder, "LyCORIS, module full", {"lora_unet_mid.weight": change.detach().numpy()})


def _tucker(folder: Path) -> None:
    from lycoris.modules.locon import LoConModule
    from torch import nn

    module = LoConModule("mid", nn.Conv2d(6, 8, 3), lora_dim=2, alpha=3, use_tucker=True)
    _lycoris(folder, _filled(module, 2), module.get_diff_weight()[0])


def _middle(folder: Path) -> None:
    a, b, middle = random("middle", (4, 12), (16, 4), (4, 4))
    tensors = {"lora_A.weight": a, "lora_B.weight": b, "lora_latent_mapping.weight": middle}
    named = {f"up.{key}": value for key, value in tensors.items()}
    named["up.default_lora_latent_mapping.weight"] = named.pop("up.lora_latent_mapping.weight")
    folder_of_peft(folder, named)
    case(folder, "definition of LoRA-XS, α/r · B M A", {"up.weight": 2.0 * b @ middle @ a})


def _qalora(folder: Path) -> None:
    a, b = random("qalora", (4, 3), (16, 4))
    folder_of_peft(
        folder, {"up.lora_A.weight": a, "up.lora_B.weight": b}, use_qalora=True, qalora_group_size=4
    )
    # The layer sees the mean of each group of 4 inputs, times the 3 groups.
    pooling = np.kron(np.eye(3), np.full((1, 4), 3.0 / 4.0)).astype(np.float32)
    save(folder / "base.safetensors", {"up.weight": np.zeros((16, 12), np.float32)})
    case(folder, "definition of QA-LoRA, α/r · B A P", {"up.weight": 2.0 * b @ a @ pooling})


def _loralib(folder: Path) -> None:
    a, b = random("loralib", (4, 12), (16, 2))
    conv_a, conv_b = random("conv", (6, 6), (12, 6))  # of 2 channels to 4, by 3 by 3, of rank 2
    tensors = {"up.lora_A": a, "up.lora_B": b, "conv.lora_A": conv_a, "conv.lora_B": conv_b}
    save(folder / "adapter.safetensors", tensors)
    change = np.zeros((24, 12), np.float32)  # of three projections, the first and the last
    change[:8], change[16:] = 4.0 * b[:8] @ a[:2], 4.0 * b[8:] @ a[2:]
    case(
        folder,
        "definitions of MergedLinear, α/r · B A by groups, and of ConvLoRA, α/r · (B A).view",
        {"up.weight": change, "conv.weight": (4.0 * conv_b @ conv_a).reshape(4, 2, 3, 3)},
        format="loralib",
        settings={"alpha": "8", "groups": "101", "kernel": "3"},
    )


def _gated(folder: Path) -> None:
    a, b, gate = random("gated", (4, 12), (16, 4), (1, 4))
    gate[0, 1] = 0.0
    tensors = {"up.lora.lora_A": a, "up.lora.lora_B": b, "up.lora.gate": gate}
    save(folder / "adapter.safetensors", tensors)
    case(
        folder,
        "definition of SoRA, α/r · B diag(gate) A",
        {"up.weight": 2.0 * b @ np.diag(gate[0]) @ a},
        format="loralib",
        settings={"alpha": "8"},
    )


def _increlora(folder: Path) -> None:
    a, b, e = random("increlora", (3, 12), (16, 3), (3, 1))
    tensors = {}
    for i in range(3):
        tensors |= {f"up.lora_A.{i}": a[i : i + 1], f"up.lora_B.{i}": b[:, i : i + 1]}
        tensors[f"up.lora_E.{i}"] = e[i : i + 1]
    save(folder / "adapter.safetensors", tensors)
    case(
        folder,
        "definition of IncreLoRA, α/(ranknum + 1e-5) · B (A ∘ E)",
        {"up.weight": (8.0 / (2.0 + 1e-5) * b @ (a * e)).astype(np.float32)},
        format="loralib",
        settings={"alpha": "8", "ranknum": "2"},
    )


def _on_the_weight(folder: Path, algorithm: str) -> None:
    from importlib.metadata import version

    import torch
    from lycoris import LycorisNetwork, create_lycoris

    torch.manual_seed(3)
    model = torch.nn.Module()
    model.up = torch.nn.Linear(12, 16, bias=False)
    base = model.up.weight.detach().clone()
    LycorisNetwork.apply_preset({"target_module": ["Linear"], "unet_target_module": []})
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1, algo=algorithm)
    network.apply_to()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    network.save_weights(str(folder / "adapter.safetensors"), torch.float32, {})
    with torch.no_grad():
        change = (model.up(torch.eye(12)).T - base).numpy()
    network.restore()
    save(folder / "base.safetensors", {"up.weight": base.numpy()})
    source = f"LyCORIS {version('lycoris-lora')}"
    case(folder, source, {"lycoris_up.weight": np.ascontiguousarray(change)})


DEFINED = {
    "butterfly_oft": lambda folder: _on_the_weight(folder, "boft"),
    "diag_oft": lambda folder: _on_the_weight(folder, "diag-oft"),
    "lycoris_glora": lambda folder: _on_the_weight(folder, "glora"),
    "lycoris_ia3": lambda folder: _on_the_weight(folder, "ia3"),
    "full": _full,
    "gated": _gated,
    "increlora": _increlora,
    "loralib": _loralib,
    "middle": _middle,
    "qalora": _qalora,
    "tucker": _tucker,
}
"""By kind, what writes the fixture of one that PEFT does not make."""

if __name__ == "__main__":
    main(sys.argv[1:])
