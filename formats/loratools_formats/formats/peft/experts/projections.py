"""A stack for each projection: `experts.gate_up_proj.lora_A` (E, r, in), `lora_B` (E, out, r).

A first axis of 1 is a factor that all experts share; shared-outer files share gate's and up's A
and down's B. The other factor may be numbered, `experts.3.gate_proj.lora_B` (out, r), as
Megatron-Bridge exports it. SGLang reads both; Megatron-Bridge streams the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loratools_formats.core.adapter import ExpertLayout
from loratools_formats.core.expert_names import LEAVES, OF_MIXTRAL, SINGLE
from loratools_formats.core.peft_facts import NESTED
from loratools_formats.core.tensors import TensorRef, joined
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft.experts.layout import (
    JOINED,
    A,
    B,
    Layout,
    Plain,
    factor,
    flat,
    named,
    with_patterns,
    with_targets,
)

_WHOLE = re.compile(rf"(?P<owner>(?:.*\.)?experts)\.(?P<leaf>{LEAVES})")


@dataclass
class _Side:
    """One factor of one projection: of all experts, or one by one."""

    whole: TensorRef | None = None
    each: dict[int, TensorRef] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        """How many experts it is for; 1 if all of them share it."""
        return len(self.each) if self.whole is None else self.whole.shape[0]

    def of(self, expert: int) -> TensorRef:
        if self.whole is None:
            return self.each[expert]
        return self.whole.matrix(expert if self.whole.shape[0] > 1 else 0)

    def stack(self, experts: int) -> TensorRef:
        """Return (E, …), a shared factor once for each expert."""
        if self.whole is not None and self.whole.shape[0] == experts:
            return self.whole
        parts = [self.of(expert) for expert in range(experts)]
        return joined(parts[0].key, parts, (experts, *parts[0].shape))


_Projections = dict[str, dict[str, dict[str, _Side]]]
"""By owner, projection and factor."""


def _claims(tensors: Mapping[str, TensorRef]) -> bool:
    return any(_is_whole(name, tensor) for name, tensor in tensors.items())


def _is_whole(name: str, tensor: TensorRef) -> bool:
    found = factor(name)
    return found is not None and len(tensor.shape) == 3 and bool(_WHOLE.fullmatch(found[0]))


def _read(found: Plain, folder: Path) -> Plain:
    sides, made = _sorted(found.tensors)
    parameters: dict[str, str] = {}
    moved: dict[str, list[str]] = {}
    shared = False
    for owner, projections in sides.items():
        experts = _count(owner, projections, folder)
        shared |= any(
            side.whole is not None and side.experts == 1 < experts
            for parts in projections.values()
            for side in parts.values()
        )
        is_joined = found.layout is None and set(projections) <= set(JOINED)  # not Tinker's
        for leaf, parts in projections.items():
            if is_joined:
                nest = NESTED if leaf == JOINED[0] and JOINED[1] in projections else ""
                parameters[f"{owner}{nest}"] = f"{owner}.{leaf}"
                stacks = parts[A].stack(experts), parts[B].stack(experts)
                _check(f"{owner}.{leaf}", *stacks, folder)
                made |= flat(f"{owner}{nest}", *stacks)
                continue
            for expert in range(experts):
                path = f"{owner}.{expert}.{OF_MIXTRAL.get(leaf, leaf)}"
                made |= {named(path, part): side.of(expert) for part, side in parts.items()}
                moved.setdefault(f"{owner}.{leaf}", []).append(path)
    told = "a stack for each projection" + (
        ", with factors that all experts share" if shared else ""
    )
    layout = ExpertLayout(
        "shared-outer" if shared else LAYOUT.name, f"{told} (names and shapes tell)"
    )
    return Plain(
        with_targets(with_patterns(found.values, moved, folder), made, parameters),
        made,
        found.straight | parameters.keys(),
        layout,
    )


def _sorted(tensors: Mapping[str, TensorRef]) -> tuple[_Projections, dict[str, TensorRef]]:
    """Return the factors of stacks by owner, and all other tensors.

    Numbered factors belong here where the other factor of their projection is one for all.
    """
    sides: _Projections = {}
    rest: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        path, part = factor(name) or ("", "")
        whole = _WHOLE.fullmatch(path)
        if whole is not None and len(tensor.shape) == 3:
            parts = sides.setdefault(whole["owner"], {}).setdefault(whole["leaf"], {})
            parts.setdefault(part, _Side()).whole = tensor
        else:
            rest[name] = tensor
    for name in list(rest):
        path, part = factor(name) or ("", "")
        numbered = SINGLE.fullmatch(path)
        if numbered is None:
            continue
        parts = sides.get(numbered["owner"], {}).get(numbered["leaf"], {})
        if parts and (part not in parts or parts[part].whole is None):
            tensor = rest.pop(name)
            parts.setdefault(part, _Side()).each[int(numbered["index"])] = tensor
    return sides, rest


def _count(owner: str, projections: Mapping[str, Mapping[str, _Side]], folder: Path) -> int:
    """Return the number of experts, which is one for all factors that are not shared."""
    for leaf, parts in projections.items():
        missing = {A, B} - parts.keys()
        if missing:
            raise AdapterError(
                "module lacks one of its two factors",
                path=folder,
                tensor=f"{owner}.{leaf}",
                expected=named(f"{owner}.{leaf}", missing.pop()),
            )
        for side in parts.values():
            if side.whole is None and set(side.each) != set(range(len(side.each))):
                raise AdapterError(
                    "an expert is missing",
                    path=folder,
                    tensor=f"{owner}.{leaf}",
                    got=f"{len(side.each)} experts, the last of number {max(side.each)}",
                )
    counts = {side.experts for parts in projections.values() for side in parts.values()}
    several = counts - {1}
    if len(several) > 1:
        raise AdapterError(
            "factors of one layer are of different numbers of experts",
            path=folder,
            tensor=owner,
            got=", ".join(map(str, sorted(several))),
        )
    if not several:
        raise UnsupportedError(
            "all experts share both factors, and nothing tells how many experts there are",
            path=folder,
            tensor=owner,
            expected="a factor with a first axis of the number of experts",
            hint="Where a layer has one expert, name its factors as its own, without the first "
            f"axis: {owner}.0.{next(iter(projections))}",
        )
    for leaf, parts in projections.items():
        if {side.experts for side in parts.values()} == {1}:
            raise UnsupportedError(
                "all experts share both factors of a projection",
                path=folder,
                tensor=f"{owner}.{leaf}",
                expected=f"a factor with a first axis of {max(several)}",
            )
    return max(several)


def _check(path: str, a: TensorRef, b: TensorRef, folder: Path) -> None:
    if a.shape[1] != b.shape[2]:
        raise AdapterError(
            "expert factors do not fit together",
            path=folder,
            tensor=path,
            got=f"{list(a.shape)} and {list(b.shape)}",
            expected="lora_A (E, r, in) and lora_B (E, out, r)",
        )


LAYOUT = Layout("3d", _claims, _read)
