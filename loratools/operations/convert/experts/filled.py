"""Write zeros for projections that a layer's experts lack, for programs that want all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.tensors import TensorRef

_SINGLE = re.compile(r"(?P<expert>(?:.*\.)?experts\.\d+)\.(?P<leaf>gate_proj|up_proj|down_proj)")
_GATED = ("gate_proj", "up_proj", "down_proj")


def filled(modules: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Return modules where each expert has all of its projections.

    Without any gate in the file, two are all.
    """
    made = dict(modules)
    experts: dict[str, dict[str, ModuleChange]] = {}
    for name, change in modules.items():
        match = _SINGLE.fullmatch(name)
        if match is not None:
            experts.setdefault(match["expert"], {})[match["leaf"]] = change
    gated = any("gate_proj" in leaves for leaves in experts.values())
    for expert, leaves in experts.items():
        like = next(iter(leaves.items()))
        for leaf in _GATED if gated else _GATED[1:]:
            if leaf not in leaves:
                made[f"{expert}.{leaf}"] = _zeros(like[0], like[1], leaf)
    return made


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
