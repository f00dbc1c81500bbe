"""Stacks of experts that a PEFT folder shall hold, on the side where a reader will take A to be.

A flat stack has no axis of its own for the experts, and where it is square its shape does not tell
on which side A is: a reader takes the side that PEFT has for the class of the base. Since 0.19.1
that is the inputs, but for Llama 4's, which it has on the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.findings import Finding
from loratools_formats.core.orientation import exchanged
from loratools_formats.core.peft_facts import family_of
from loratools_formats.disk.errors import AdapterError, UnsupportedError
from loratools_formats.formats.peft.config import PeftConfig
from loratools_formats.formats.peft.experts.layout import JOINED
from loratools_formats.formats.peft.experts.packed import PACKED
from loratools_formats.formats.peft.parameters import Setting
from loratools_formats.formats.peft.sides import (
    Sides,
    of_open_class,
    release,
    sides_told,
    width_of,
)

_RELEASE = "0.19.1"
"""The release of PEFT whose sides are written where shapes do not tell them."""
_LLAMA_4 = "llama4"
"""The family, in transformers, of the one class of which PEFT has A on the outputs."""


def sayable(adapter: Adapter) -> Adapter:
    """Return an adapter whose stacks a reader of its folder will take as they are.

    Stacks are turned where that is needed, which is exact. If a flat stack cannot say on which side
    A is, all get an axis for the experts, which PEFT does not read.

    Raises:
        UnsupportedError: no layout says it.
    """
    stacks = _flat_stacks(adapter)
    known = {path: part for path, part in stacks.items() if part.layer.swapped is not None}
    if not known or _are_told(adapter, known):
        return adapter
    modules = dict(adapter.modules)
    for path, part in known.items():
        modules[path] = modules[path].with_direction(
            _on_side(part, _peft_has(adapter.config, path, part) is True)
        )
    turned = replace(adapter, modules=modules, config=_of_new_release(adapter.config))
    changes_others = len(known) < len(stacks) and turned.config != adapter.config
    if not changes_others and _are_told(turned, {path: _part(turned, path) for path in known}):
        return turned
    leaves = {name.rpartition(".")[2] for part in stacks.values() for name in part.layer.parameters}
    if len(known) < len(stacks) or not leaves <= set(JOINED):
        raise UnsupportedError(
            "a stacked file cannot say on which side of these experts A is",
            path=adapter.source,
            tensor=next(iter(known)),
            got=list(next(iter(known.values())).shape),
            hint=_hint(adapter),
        )
    for path, part in known.items():
        modules[path] = modules[path].with_direction(_on_side(part, swapped=False))
    return replace(turned, modules=modules, write_as="3d")


def writing_findings(adapter: Adapter) -> list[Finding]:
    """Return findings about stacks that are not written as PEFT writes them."""
    if adapter.format != "peft" or adapter.write_as or not _flat_stacks(adapter):
        return []
    if not sayable(adapter).write_as:
        return []
    path = next(iter(_flat_stacks(adapter)))
    text = (
        "square stacks of experts need an axis for the experts, which PEFT does not load: nothing "
        "else says on which side A is, and PEFT's side depends on the model"
    )
    return [Finding("experts-laid-out", "warning", path, text, _hint(adapter))]


@dataclass(frozen=True)
class _Flat:
    """What a reader sees of an adapter's flat stacks."""

    config: PeftConfig
    told: Mapping[str, tuple[bool | None, str]]


def _are_told(adapter: Adapter, known: Mapping[str, LowRank]) -> bool:
    """Return whether a reader takes A of each stack to be where it is."""
    seen = _seen(adapter)
    return seen is not None and all(_is_told(path, part, seen) for path, part in known.items())


def _is_told(path: str, part: LowRank, seen: _Flat) -> bool:
    told, _ = seen.told[path]
    if told is not None:
        return told == part.layer.swapped
    if part.shape[0] != part.shape[1]:
        return True  # the shape of the base's parameter will tell
    if release(seen.config) is not None:  # its reader takes the parameter to be (E, in, out)
        return part.layer.transposed_if_square is True
    return _peft_has(seen.config.values, path, part) == part.layer.swapped


def _seen(adapter: Adapter) -> _Flat | None:
    """Return what a reader sees; None if it would refuse the file."""
    config = PeftConfig(adapter.config)
    parts = adapter.factors()
    named = {n: Setting(p.layer.parameters, 0.0, p.rank) for n, p in parts.items()}
    stacks = {n: Sides(p.shape[1], p.shape[0]) for n, p in parts.items() if _is_stack(p)}
    inputs = {n: p.shape[1] for n, p in parts.items() if p.layer.kind == "linear"}
    try:
        return _Flat(config, sides_told(config, stacks, named, width_of(inputs, named), None))
    except AdapterError:
        return None


def _peft_has(values: Mapping[str, Any], path: str, part: LowRank) -> bool | None:
    """Return whether PEFT has A of a stack on the outputs; None if the model is not known."""
    if not of_open_class(path):
        return False
    family = family_of(values)
    if family is not None:
        return family == _LLAMA_4
    swapped, turn = part.layer.swapped, part.layer.transposed_if_square
    return None if swapped is None or turn is None else swapped != turn


def _on_side(part: LowRank, swapped: bool) -> LowRank:
    return part if part.layer.swapped == swapped else exchanged(part)


def _part(adapter: Adapter, path: str) -> LowRank:
    return adapter.modules[path].require_factors()


def _flat_stacks(adapter: Adapter) -> dict[str, LowRank]:
    if adapter.write_as in PACKED:
        return {}
    parts = adapter.factors()
    return {path: part for path, part in parts.items() if _is_stack(part)}


def _is_stack(part: LowRank) -> bool:
    return part.layer.kind == "experts" and bool(part.layer.parameters)


def _of_new_release(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if release(PeftConfig(values)) is None:
        return values
    return {**values, "peft_version": _RELEASE}


def _hint(adapter: Adapter) -> str:
    convert = command_on(adapter, "convert", "--to peft --base BASE", output="converted")
    return f"Give the base first, which tells PEFT's side: {convert}"
