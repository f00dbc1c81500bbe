"""Facts about PEFT's layers and names that its reader shares with whoever computes as PEFT does."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING

from loratools_formats.core.orientation import named_conv1d

if TYPE_CHECKING:
    from loratools_formats.core.change import ModuleChange

PREFIX = "base_model.model."
"""What PEFT's files put before a module's path."""

ALL_LINEAR = "all-linear"
"""The target_modules by which PEFT adapts every linear layer but the output layer."""

OF_LANGUAGE_MODEL = (
    r"(?:base_model\.)?(?:model\.)+(?:language_model\.)?(?:decoder\.|encoder\.)?layers\.\d+\."
    r"|language_model\.model\.layers\.\d+\."
    r"|(?:bert\.|roberta\.|electra\.)?encoder\.layer\.\d+\."
    r"|(?:transformer\.)?h\.\d+\.(?:attn|mlp|self_attention)\."
    r"|gpt_neox\.layers\.\d+\."
)
"""Beginnings of paths in language models, which no model of the diffusion world has."""

_EXPERT = re.compile(r"(?P<owner>.+)\.experts\.\d+\.(?:gate_proj|up_proj|down_proj|w1|w2|w3)")
_ROUTER = ".gate"

B_LAYOUT = "lora_B_layout"
"""The key of the configuration that says how the columns of a stacked lora_B are ordered."""
FUSED_EXPERTS = "unsloth_fused_expert_lora"
"""An older key of Unsloth's that says so."""
RANK_MAJOR, EXPERT_MAJOR = "rank_major", "grouped_by_expert"


def square_orientation(fan_in_fan_out: bool, path: str) -> bool | None:
    """Tell whether a square weight is stored (in, out), None where the file does not show it.

    PEFT writes one `fan_in_fan_out` for all modules, that of the layer wrapped last; a GPT-2
    adapter which also covers the linear lm_head says false although its Conv1D layers are not.
    """
    return fan_in_fan_out if fan_in_fan_out == named_conv1d(path) else None


def family_of(values: Mapping[str, object]) -> str | None:
    """Return the family of transformers whose class was adapted, as a configuration names it.

    PEFT writes it if it was given no task.

    >>> family_of({"auto_mapping": {"parent_library": "transformers.models.olmoe.modeling_olmoe"}})
    'olmoe'
    """
    auto = values.get("auto_mapping")
    library = auto.get("parent_library") if isinstance(auto, Mapping) else None
    match = _LIBRARY.fullmatch(str(library))
    return None if match is None else match[1]


_LIBRARY = re.compile(r"transformers\.models\.(\w+)\.modeling_\w+")


def replaced_name(target: str, modules: Container[str]) -> str:
    """Return the name in a PEFT file of a tensor that replaces one of the base.

    >>> replaced_name("q.bias", {"q"})
    'base_model.model.q.base_layer.bias'
    """
    module, _, leaf = target.rpartition(".")
    wrapped = f"{module}{NESTED}" if module in modules else module
    return f"{PREFIX}{wrapped}.{leaf}"


NESTED = ".base_layer"
"""What PEFT puts behind a module's path for each further parameter of it that is adapted."""


def without_gaps(modules: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Return modules whose changes of parameters nest without gaps, as PEFT looks for them.

    PEFT stores changes of several parameters of one module below each other, as `experts.lora_A`
    and `experts.base_layer.lora_A`. One that is left alone stands at the top.
    """
    depths: dict[str, list[str]] = {}
    for path, change in modules.items():
        if change.layer.parameters:
            depths.setdefault(owner(path), []).append(path)
    moved = {
        path: module + NESTED * depth
        for module, paths in depths.items()
        for depth, path in enumerate(sorted(paths, key=len))
    }
    return {moved.get(path, path): change for path, change in modules.items()}


def owner(path: str) -> str:
    """Return the module that a change of one of its parameters is stored under.

    >>> owner("layers.0.mlp.experts.base_layer")
    'layers.0.mlp.experts'
    """
    while path.endswith(NESTED):
        path = path.removesuffix(NESTED)
    return path


def frod_category(path: str) -> str:
    """Return the name under which FRoD keeps what layers of one role share.

    Source: `_category_from_key` in peft 0.21.2.
    """
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def stacked_on_loading(modules: Iterable[str]) -> list[str]:
    """Return the modules that must have one rank and alpha, so that PEFT can stack them on loading.

    On transformers 5, PEFT joins experts that are adapted one by one to stacked parameters, and
    takes routers for parameters too. It gives all of them the configuration's r and lora_alpha:
    twice these for `gate_up_proj`, whatever rank_pattern says of the names in the file.

    Source: `_convert_peft_config_moe` of peft 0.21.2.

    >>> stacked_on_loading(["l.0.mlp.experts.0.up_proj", "l.0.mlp.gate", "l.0.mlp.shared.up_proj"])
    ['l.0.mlp.experts.0.up_proj', 'l.0.mlp.gate']
    """
    names = list(modules)
    owners = {found["owner"] for name in names if (found := _EXPERT.fullmatch(name))}
    routers = {f"{owner}{_ROUTER}" for owner in owners}
    return [name for name in names if name in routers or _EXPERT.fullmatch(name)]


_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_REFUSED_IN_MAMBA = frozenset({"out_proj", "conv1d"})
_REFUSING = frozenset({"LORA", "ADALORA", "XLORA", "RANDLORA"})


def refused_modules(
    model_type: object, modules: Iterable[str], peft_type: object = "LORA"
) -> list[str]:
    """Return the modules that PEFT refuses to adapt in a model of a type.

    Source: `_check_lora_target_modules_mamba` of peft 0.21.2.

    Args:
        model_type: of the model's configuration.
        modules: the names of the modules.
        peft_type: of the adapter's configuration; other kinds than LoRA's are not refused.

    >>> refused_modules("mamba", ["layers.0.mixer.in_proj", "layers.0.mixer.out_proj"])
    ['layers.0.mixer.out_proj']
    """
    if model_type not in _MAMBA or peft_type not in _REFUSING:
        return []
    return [name for name in modules if name.rpartition(".")[2] in _REFUSED_IN_MAMBA]


def targets(names: Iterable[str], present: Iterable[str]) -> list[str] | str:
    r"""Return `target_modules` by which PEFT makes layers for some modules and for no others.

    PEFT takes a listed name for every module whose path ends in it. Where that would be another one
    than is meant, a regular expression, which it matches whole, names the modules.

    Args:
        names: the modules that are meant.
        present: all modules of the model.

    >>> targets(["layers.0.q"], ["layers.0.q", "layers.1.q"])
    ['layers.0.q']
    >>> targets(["layers.0.q"], ["layers.0.q", "vision.layers.0.q"])
    'layers\\.0\\.q'
    """
    wanted = sorted(names)
    others = set(present) - set(wanted)
    ends = {
        ".".join(parts[start:])
        for parts in (name.split(".") for name in others)
        for start in range(1, len(parts))
    }
    if ends.isdisjoint(wanted):
        return wanted
    return "|".join(map(re.escape, wanted))


DECLARED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "v1", "down_proj", "w2")
"""Parameters of experts in the order in which transformers declares them, as PEFT nests them."""


def declared(parameter: str) -> int:
    """Return where a parameter stands among those of its module; PEFT wraps the first innermost.

    >>> declared("model.layers.0.mlp.experts.down_proj") > declared("mlp.experts.up_proj")
    True
    """
    leaf = parameter.rpartition(".")[2]
    return DECLARED.index(leaf) if leaf in DECLARED else len(DECLARED)


def nested_paths(module: str, parameters: Iterable[str]) -> dict[str, str]:
    """Return the paths of a module's adapted parameters in PEFT, the one declared first innermost.

    >>> nested_paths("mlp.experts", ["gate_up_proj", "down_proj"])
    {'down_proj': 'mlp.experts', 'gate_up_proj': 'mlp.experts.base_layer'}
    """
    outermost_first = sorted(parameters, key=declared, reverse=True)
    return {name: module + NESTED * depth for depth, name in enumerate(outermost_first)}
