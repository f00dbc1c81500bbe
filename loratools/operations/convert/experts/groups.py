"""The experts of an adapter, by the module that holds them, with A on the inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from loratools.base.placement.class_view import names_in_class
from loratools.base.placement.names import Names
from loratools.base.placement.orient import stack_is_swapped
from loratools_formats.checkpoints import expert_classes
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import model_types
from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.expert_names import OF_MIXTRAL, SINGLE
from loratools_formats.core.findings import Finding
from loratools_formats.core.orientation import exchanged
from loratools_formats.core.peft_facts import NESTED, family_of, owner
from loratools_formats.disk.errors import UnsupportedError, printable

Order = Literal["halves", "alternating"]
"""Of the outputs in a joined gate and up: all of gate's first, or one of each by turns."""

_GPT_OSS = re.compile(r"gpt[-_.]?oss", re.IGNORECASE)
_IN_HALVES = re.compile(
    r"(?:^|[-_.])(?:qwen|mixtral|deepseek|moonlight|kimi|olmoe|flexolmo|glm|granite|ernie|hunyuan"
    r"|phi|minimax|nemotron|lfm2|jamba|exaone|longcat|solar|gemma)",
    re.IGNORECASE,
)
"""In the last part of a model's name: families that join gate and up in halves."""


@dataclass
class Group:
    """The experts of one layer.

    Attributes:
        owner: the module that holds them, such as `model.layers.0.mlp.experts`.
        stacks: changes of stacked parameters by the parameter's name, A on the inputs.
        single: changes of single experts by projection and number.
    """

    owner: str
    stacks: dict[str, ModuleChange] = field(default_factory=dict)
    single: dict[str, dict[int, ModuleChange]] = field(default_factory=dict)


@dataclass
class Sorted:
    """An adapter's modules.

    Attributes:
        groups: those of experts, by their owner.
        others: all the rest, by path.
    """

    groups: dict[str, Group]
    others: dict[str, ModuleChange]


def sorted_experts(adapter: Adapter, base: Checkpoint | None) -> Sorted:
    """Return an adapter's experts by layer.

    Raises:
        UnsupportedError: which parameter a change is of, or which side A is on, is not told.
    """
    names = None if base is None else names_in_class(base)
    found = Sorted({}, {})
    for path, change in adapter.modules.items():
        single = SINGLE.fullmatch(path)
        if (
            change.factors is not None
            and change.layer.kind == "experts"
            and change.layer.parameters
        ):
            module = owner(path)
            parameter = _parameter(adapter, path, change)
            part = change.require_factors()
            layer = replace(part.layer, parameters=(parameter,))
            told = change.with_direction(replace(part, layer=layer))
            group = found.groups.setdefault(module, Group(module))
            leaf = parameter.rpartition(".")[2]
            group.stacks[leaf] = _straight(adapter, path, told, names)
        elif single is not None and change.factors is not None and not change.is_dora:
            group = found.groups.setdefault(single["owner"], Group(single["owner"]))
            leaf = OF_MIXTRAL.get(single["leaf"], single["leaf"])
            group.single.setdefault(leaf, {})[int(single["index"])] = change
        else:
            found.others[path] = change
    return found


def refuse_no_pairs(adapter: Adapter, found: Sorted, layout: str | None) -> None:
    """Refuse single experts that are no plain LoRAs, which only their own layout holds.

    Raises:
        UnsupportedError: another layout is asked for, and there are some, or biases of factors.
    """
    if layout in (None, "each"):
        return
    for path, change in found.others.items():
        if SINGLE.fullmatch(path):
            raise UnsupportedError(
                f"experts that are no plain LoRAs cannot be written as {layout}",
                path=adapter.source,
                tensor=path,
                got=change.kind,
                hint="Make it a plain LoRA first: "
                + command_on(adapter, "to-lora", "--base BASE --rank RANK"),
            )
    for group in found.groups.values():
        for leaf, changes in group.single.items():
            for expert, change in changes.items():
                if change.require_factors().bias is not None:
                    raise UnsupportedError(
                        f"experts that have biases of factors (lora_bias) cannot be written as "
                        f"{layout}, which has no place for them",
                        path=adapter.source,
                        tensor=f"{group.owner}.{expert}.{leaf}",
                        hint="Keep them one by one, which is exact: "
                        + command_on(
                            adapter, "convert", "--to peft --experts each", output="converted"
                        ),
                    )


def straightened(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter whose stacks all have A on the inputs.

    Raises:
        UnsupportedError: which side it is on is not told.
    """
    if adapter.format != "peft":
        return adapter
    stacks = {n: c for n, c in adapter.modules.items() if c.layer.kind == "experts" and c.factors}
    if base is None or all(change.layer.swapped is False for change in stacks.values()):
        return adapter
    names = names_in_class(base)
    turned = {path: _straight(adapter, path, change, names) for path, change in stacks.items()}
    return replace(adapter, modules={**adapter.modules, **turned})


def _parameter(adapter: Adapter, path: str, change: ModuleChange) -> str:
    leaves = {each.rpartition(".")[2]: each for each in change.layer.parameters}
    is_inner = path.endswith(NESTED)
    if leaves.keys() == {"gate_up_proj", "down_proj"} and (
        is_inner or f"{path}{NESTED}" in adapter.modules
    ):
        return leaves["gate_up_proj" if is_inner else "down_proj"]  # declared first is innermost
    if len(change.layer.parameters) > 1:
        raise UnsupportedError(
            "the file does not say which parameter of the experts this is",
            path=adapter.source,
            tensor=path,
            got=", ".join(change.layer.parameters),
            hint=base_hint(adapter),
        )
    return change.layer.parameters[0]


def _straight(
    adapter: Adapter, path: str, change: ModuleChange, names: Names | None
) -> ModuleChange:
    part = change.require_factors()
    swapped = part.layer.swapped
    if swapped is None and names is not None and part.layer.kind == "experts":
        swapped = stack_is_swapped(names, part.layer.parameters[0], part)
    if swapped is None:
        raise UnsupportedError(
            "without the base, it is not known whether A is on the inputs of these experts",
            path=adapter.source,
            tensor=path,
            got=list(part.shape),
            hint=base_hint(adapter),
        )
    part = exchanged(part) if swapped else part
    return change.with_direction(replace(part, layer=replace(part.layer, swapped=False)))


def base_hint(adapter: Adapter) -> str:
    """Return the command that gives the base, which tells more."""
    return "Give the base: " + command_on(adapter, "convert", "--base BASE", output="converted")


def types_of(adapter: Adapter, base: Checkpoint | None) -> frozenset[str]:
    """Return the model types that a base, or the configuration of an adapter, names."""
    if base is not None:
        return frozenset(model_types(base.config))
    family = family_of(adapter.config)
    if family is not None:
        return frozenset({family})
    name = adapter.base_model or ""
    says = _GPT_OSS.search(name) is not None and not _names_other(name)
    return frozenset({"gpt_oss"}) if says else frozenset()


def _names_other(name: str) -> bool:
    """Return whether a model's name names a family other than gpt-oss, alone or beside it."""
    return _IN_HALVES.search(re.split(r"[/\\]", name.rstrip("/\\"))[-1]) is not None


def has_gate(adapter: Adapter, group: Group, base: Checkpoint | None) -> bool | None:
    """Return whether the model's experts have a gate; None if nothing tells.

    Nemotron's have none. A file may adapt up alone of a model that has one.
    """
    if group.single.keys() & {"gate_proj", "gate_up_proj"} or "gate_up_proj" in group.stacks:
        return True
    types = types_of(adapter, base)
    if types:
        return not types & _WITHOUT_GATE
    return False if group.owner.endswith("mixer.experts") else None


_WITHOUT_GATE = frozenset({"nemotron_h"})


def order_of(
    adapter: Adapter, groups: Mapping[str, Group], base: Checkpoint | None
) -> tuple[Order, tuple[Finding, ...]]:
    """Return how gate and up are joined in the model, with a finding if its name and sizes tell.

    gpt-oss alone alternates them. Its released models have experts that are as wide as the model,
    but others of its class need not; so sizes alone tell nothing.

    Raises:
        UnsupportedError: nothing tells.
    """
    types = types_of(adapter, base)
    if types:
        return ("alternating" if types & expert_classes.ALTERNATING else "halves"), ()
    name = adapter.base_model or ""
    for group in groups.values():
        down = group.stacks.get("down_proj") or next(
            iter(group.single.get("down_proj", {}).values()), None
        )
        is_other = not group.owner.endswith("mlp.experts") or (
            _names_other(name) and not _GPT_OSS.search(name)
        )
        if is_other and down is not None and down.shape[0] != down.shape[1]:
            text = (
                "gate and up are taken to be joined in halves, as in all models but gpt-oss, which "
                "this is not by its name or modules; `base` makes it certain"
            )
            return "halves", (Finding("expert-halves-assumed", "warning", group.owner, text),)
    raise UnsupportedError(
        "without it, it is not known whether the model joins gate and up in halves or alternating",
        path=adapter.source,
        tensor=next(iter(groups)),
        got=f"a base named {printable(name)}" if name else "no name of a base",
        hint=base_hint(adapter),
    )
