"""Which tensors hold a module's weight or bias, by names alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

from loratools.base.placement import rules
from loratools.base.placement.fused import STACKED_GLU, FusedPart, fusions
from loratools.base.placement.names import Names

_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<index>\d{1,6})\.(?P<leaf>[a-z0-9_]+)")
_STACKED = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
}


@dataclass(frozen=True)
class Site:
    """A tensor that holds a module's weight, or some of it, or more than it.

    Attributes:
        key: the tensor.
        part: which part of a fused weight the module is, if it is one.
        share: (index, count) if the tensor is one of the parts that the module fuses.
        plane: which of the stacked matrices it is, if the module is one expert.
    """

    key: str
    part: FusedPart | None = None
    share: tuple[int, int] | None = None
    plane: int | None = None


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
    for part in fusions(module):
        # The parameters of `nn.MultiheadAttention` are called in_proj_weight and in_proj_bias.
        name = (
            part.module.removesuffix("weight") + leaf
            if part.leaf == "in_proj_weight"
            else f"{part.module}.{leaf}"
        )
        key = names.find(name)
        if key is not None:
            return [Site(key, part=part)]
    parent, dot, own = module.rpartition(".")
    parts = rules.JOINED_BY_NAME.get(own, ())
    found = [names.find(f"{parent}{dot}{part}.{leaf}") for part in parts]
    keys = [key for key in found if key is not None]
    if parts and len(keys) == len(parts):
        return [Site(key, share=(i, len(keys))) for i, key in enumerate(keys)]
    return _in_stack(names, module) if leaf == "weight" else []


def _in_stack(names: Names, module: str) -> list[Site]:
    match = _EXPERT.fullmatch(names.spelling(module))
    if match is None or match["leaf"] not in _STACKED:
        return []
    parameter, half = _STACKED[match["leaf"]]
    stack = f"{match['stack']}.{parameter}"
    key = names.find(stack)
    if key is None or len(names.tensors[key].shape) != 3:
        return []
    part = None if half is None else FusedPart(stack, STACKED_GLU, half)
    return [Site(key, part=part, plane=int(match["index"]))]
