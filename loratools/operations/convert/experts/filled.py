"""Write zeros for projections that a layer's experts lack, for programs that want all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loratools.operations.convert.experts.apart import whole
from loratools.operations.convert.experts.groups import Group
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.expert_names import GATED
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError

_SINGLE = re.compile(r"(?P<expert>(?:.*\.)?experts\.\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)")


def filled(modules: Mapping[str, ModuleChange], *, gated: bool) -> dict[str, ModuleChange]:
    """Return modules where each expert has all of its projections.

    Args:
        modules: experts one by one, and all others.
        gated: whether the model's experts have a gate.
    """
    made = dict(modules)
    experts: dict[str, dict[str, ModuleChange]] = {}
    for name, change in modules.items():
        match = _SINGLE.fullmatch(name)
        if match is not None:
            experts.setdefault(match["expert"], {})[match["leaf"]] = change
    for expert, leaves in experts.items():
        like = next(iter(leaves.items()))
        for leaf in GATED if gated else GATED[1:]:
            if leaf not in leaves:
                made[f"{expert}.{leaf}"] = _zeros(like[0], like[1], leaf)
    return made


def with_zeros(group: Group, experts: int, *, gated: bool) -> Group:
    """Return a layer's single experts with zeros for experts, and for a gate, that are not adapted.

    Args:
        group: the layer; every projection that it adapts gets all experts.
        experts: how many the model has.
        gated: whether the model's experts have a gate, which goes with up.
    """
    single = {leaf: dict(changes) for leaf, changes in group.single.items()}
    if gated and "up_proj" in single and "gate_proj" not in single:
        up = single["up_proj"]
        single["gate_proj"] = {e: _zeros("up_proj", c, "gate_proj") for e, c in up.items()}
    for leaf, changes in single.items():
        like = next(iter(changes.values()))
        for expert in range(experts):
            changes.setdefault(expert, _zeros(leaf, like, leaf))
    return replace(group, single=single)


def complete(
    adapter: Adapter, group: Group, counts: Mapping[str, int], base: Checkpoint | None
) -> Group:
    """Return a layer with all experts of its projections, zeros for those that the base has.

    Raises:
        UnsupportedError: one is missing, and no base shows that it is to be zero; or the layer has
            one expert.
    """
    experts = counts.get(group.owner, 0)
    stacks = {change.require_factors().experts for change in group.stacks.values()}
    if experts == 1 or 1 in stacks:
        raise UnsupportedError(
            "a first axis of 1 says that all experts share a factor, so that a stack for each "
            "projection cannot hold a layer of one expert",
            path=adapter.source,
            tensor=group.owner,
            hint="Write it so, which is exact: "
            + command_on(adapter, "convert", "--to peft --experts each", output="converted"),
        )
    if base is not None and group.single:
        group = with_zeros(group, experts, gated=False)
    whole(group, experts)
    return group


def _zeros(own: str, change: ModuleChange, leaf: str) -> ModuleChange:
    part: LowRank = change.require_factors()
    out, in_ = part.shape
    if (own == "down_proj") != (leaf == "down_proj"):
        out, in_ = in_, out
    a = _nothing(part.a, (part.rank, in_))
    b = _nothing(part.b, (out, part.rank))
    return change.with_direction(replace(part, a=a, b=b))


def _nothing(like: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    nbytes = shape[0] * shape[1] * like.dtype.bits // 8
    return TensorRef(like.key, like.dtype, shape, lambda: bytes(nbytes))
