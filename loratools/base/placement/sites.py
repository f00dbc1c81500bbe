"""Which tensors hold a module's weight or bias, by names alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loratools.base.placement import rules
from loratools.base.placement.fused import (
    HALVES,
    STACKED_GLU,
    FusedPart,
    fusions,
    is_alternating,
)
from loratools.base.placement.names import Names
from loratools_formats.core.expert_names import NUMBER
from loratools_formats.core.wrapped_names import unwrapped

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d{1,6})\.(?P<leaf>[a-z0-9_]+)")
_STACKED = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "gate_up_proj": ("gate_up_proj", None),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
}
_LISTED = re.compile(r"(?P<stack>.+\.experts)\.(?P<leaf>gate_up|down)_projs\.(?P<index>\d{1,6})")
"""Experts of gpt-oss as lists of layers, as Unsloth's four-bit copies have them."""


@dataclass(frozen=True)
class Site:
    """A tensor that holds a module's weight, or some of it, or more than it.

    Attributes:
        key: the tensor.
        part: which part of a fused weight the module is, if it is one.
        share: (index, count) if the tensor is one of the parts that the module fuses.
        plane: which of the stacked matrices it is, if the module is one expert.
        alternates: whether the tensor alternates the outputs of gate and up, of which the module
            has all of gate's first.
    """

    key: str
    part: FusedPart | None = None
    share: tuple[int, int] | None = None
    plane: int | None = None
    alternates: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is all of the module's weight, and no more."""
        return self.part is None and self.share is None and self.plane is None


def sites(names: Names, module: str, leaf: str) -> list[Site]:
    """Return where a module's `weight` or `bias` lies; empty if nowhere.

    Raises:
        AdapterError: a name fits several tensors.
    """
    whole = names.find(f"{module}.{leaf}")
    if whole is not None:
        return [Site(whole)]
    whole = names.find(f"{module}.in_proj_{leaf}")
    if whole is not None:
        return [Site(whole)]
    cut = names.cut_from(f"{module}.{leaf}")
    if cut is not None:
        stored, place, equal = cut
        fused = stored.removesuffix(f".{leaf}")
        return [Site(stored, FusedPart(fused, fused.rpartition(".")[2], place, equal))]
    for fusion in fusions(module):
        # The parameters of `nn.MultiheadAttention` are called in_proj_weight and in_proj_bias.
        name = (
            fusion.module.removesuffix("weight") + leaf
            if fusion.leaf == "in_proj_weight"
            else f"{fusion.module}.{leaf}"
        )
        key = names.find(name)
        if key is not None:
            return [Site(key, part=fusion)]
    spelled = (f"{module}.{leaf}", f"{module}.in_proj_{leaf}")
    parts = next(filter(None, map(names.cut_to, spelled)), None) or _joined_by_name(module, leaf)
    found = [names.find(part) for part in parts]
    keys = [each for each in found if each is not None]
    if parts and len(keys) == len(parts):
        return [Site(each, share=(i, len(keys))) for i, each in enumerate(keys)]
    if leaf != "weight":
        return []
    return _in_class(names, module) or _in_stack(names, module) or _stored_apart(names, module)


def _joined_by_name(module: str, leaf: str) -> list[str]:
    parent, dot, own = module.rpartition(".")
    return [f"{parent}{dot}{part}.{leaf}" for part in rules.JOINED_BY_NAME.get(own, ())]


def _in_stack(names: Names, module: str) -> list[Site]:
    listed = _LISTED.fullmatch(names.spelling(module))
    if listed is not None:
        key = names.find(f"{listed['stack']}.{listed['leaf']}_proj")
        is_stack = key is not None and len(names.tensors[key].shape) == 3
        return [Site(key, plane=int(listed["index"]))] if key is not None and is_stack else []
    match = _EXPERT.fullmatch(names.spelling(module))
    if match is None or match["leaf"] not in _STACKED:
        return []
    parameter, half = _STACKED[match["leaf"]]
    stack = f"{match['stack']}.{parameter}"
    own = _EXPERT.fullmatch(unwrapped(module))
    key = names.find(stack)
    if key is None and own is not None:
        key = names.find(f"{own['stack']}.{parameter}")
    if key is None or len(names.tensors[key].shape) != 3:
        return []
    part = None if half is None else FusedPart(stack, STACKED_GLU, half)
    alternates = match["leaf"] == "gate_up_proj" and is_alternating(names, stack)
    return [Site(key, part=part, plane=int(match["index"]), alternates=alternates)]


def stored_single(names: Names, module: str) -> str | None:
    """Return what the base's files call a single expert that has its class's name; None if nothing.

    The class stacks experts, and its name for one is that of the stack with a number in it.
    """
    keys = _members(names, module)
    return keys[0].removesuffix(".weight") if len(keys) == 1 else None


def _stored_apart(names: Names, module: str) -> list[Site]:
    """Return where an expert lies that has the class's name, in files that call it otherwise."""
    keys = _members(names, module)
    if len(keys) == 1:
        return [Site(keys[0])]
    return [Site(key, share=(i, len(keys))) for i, key in enumerate(keys)]


def _members(names: Names, module: str) -> list[str]:
    match = _EXPERT.fullmatch(unwrapped(module))
    if match is None or match["leaf"] not in _STACKED:
        return []
    parameter, half = _STACKED[match["leaf"]]
    experts = names.merged_into(f"{match['stack']}.{parameter}")
    index = int(match["index"])
    keys = experts[index] if index < len(experts) else []
    return keys if half is None else keys[half : half + 1]


def _in_class(names: Names, module: str) -> list[Site]:
    """Return where the class puts the weight of an expert that older releases kept apart."""
    named = names.in_class(f"{module}.weight")
    if named is None or named.rule is None:
        return []
    index = NUMBER.search(module)
    kinds = [operation for operation, _ in named.rule.operations]
    shape = names.tensors[named.name].shape if named.name in names.tensors else ()
    if index is None or len(shape) != 3 or kinds[:1] != ["MergeModulelist"]:
        return []
    if kinds == ["MergeModulelist"]:
        return [Site(named.name, plane=int(index[1]))]
    if kinds != ["MergeModulelist", "Concatenate"] or len(named.rule.sources) != 2:
        return []
    part = FusedPart(named.name, HALVES, named.source)
    return [Site(named.name, part=part, plane=int(index[1]))]
