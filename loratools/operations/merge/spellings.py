"""Adapters that name one module in two ways, which a merge must bring together or refuse.

With the base, every adapter gets the names of the base's class, which is exact. Without it nobody
can tell which of two names is the right one; adding them would give a loader two modules of which
it finds one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loratools.base.placement import rules
from loratools.folding.expert_sides import on_side_of_peft, with_sides
from loratools.operations.in_class_names import in_class_names
from loratools.operations.merge.align import MergeInput
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import owner
from loratools_formats.core.wrapped_names import unwrapped
from loratools_formats.disk.errors import AdapterError, LoratoolsError

_CHOICES = (
    (tuple(rules.QKV), rules.QKV_PARTS),
    (tuple(rules.GLU), rules.GLU_PARTS),
)
_FUSED = {part: fused for fused, choices in _CHOICES for parts in choices for part in parts}
"""By the name of a projection, the names of modules that may hold it beside others."""
_TOGETHER = frozenset(name for names in _FUSED.values() for name in names)
_EXPERTS = re.compile(
    r"(?P<layer>(?:.*\.)?\d+)\.(?:.+\.)?(?P<kind>experts|switch_mlp)\b(?P<rest>.*)"
)
_PROJECTION = re.compile(r"\.(?:gate|up|down)_proj")
_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")
_NEUTRAL = rules.NEUTRAL | {"thinker"}


def in_one_spelling(inputs: Sequence[MergeInput], base: Checkpoint | None) -> list[MergeInput]:
    """Return inputs whose modules have one name each.

    Raises:
        AdapterError: two names of one module meet, and no base tells which the class has; or a
            module fits nothing in the base.
    """
    if any(get_format(item.adapter.format).naming is not None for item in inputs):
        return list(inputs)
    if base is not None:
        sided = [replace(item, adapter=with_sides(item.adapter, base)) for item in inputs]
        inputs = [
            _as_peft_has(item, item.adapter, base) if item.adapter.format == "peft" else item
            for item in sided
        ]
    clash = _clash(inputs)
    if clash is None:
        return _of_class(inputs, base)
    if base is None:
        one, other = clash
        raise AdapterError(
            "two adapters name one module differently",
            path=other[0].adapter.source,
            got=_called(*other, one[1]),
            expected=f"{_called(*one, other[1])}, as {one[0].name} has it",
            hint="Pass `base`, whose class tells the names; they are brought together exactly",
        )
    done = _renamed(inputs, base)
    left = _clash(done)
    if left is not None:
        raise AdapterError(
            "two adapters name one module differently, and the base does not tell which is right",
            path=base.path,
            got=f"{left[0][1]} and {left[1][1]}",
        )
    return done


def _of_class(inputs: Sequence[MergeInput], base: Checkpoint | None) -> list[MergeInput]:
    """Return inputs under the names of the base's class where their modules are not the same.

    Names that no pattern here knows may still be two of one module. What the base does not have
    keeps its names, and the adapter whose names are kept has a finding that says so.
    """
    modules = {frozenset(item.adapter.modules) for item in inputs}
    if base is None or len(modules) < 2:
        return list(inputs)
    try:
        return _renamed(inputs, base)
    except LoratoolsError as error:
        text = f"the adapters' modules differ, and their names are kept: {error}"
        told = Finding("names-kept", "warning", None, text)
        first, *rest = inputs
        adapter = replace(first.adapter, findings=(*first.adapter.findings, told))
        return [replace(first, adapter=adapter), *rest]


def _renamed(inputs: Sequence[MergeInput], base: Checkpoint) -> list[MergeInput]:
    """Return inputs under the names of the base's class; new stacks are as PEFT reads them now."""
    renamed = in_class_names([item.adapter for item in inputs], base)
    return [_as_peft_has(*each, base) for each in zip(inputs, renamed, strict=True)]


def _as_peft_has(item: MergeInput, adapter: Adapter, base: Checkpoint) -> MergeInput:
    """Return an input with an adapter, whose stacks are as PEFT reads them if its file has none."""
    layout = item.adapter.expert_layout
    keeps = layout is not None and layout.name == "stacked"
    return replace(item, adapter=adapter if keeps else on_side_of_peft(adapter, base))


_Found = tuple[MergeInput, str]


def _clash(inputs: Sequence[MergeInput]) -> tuple[_Found, _Found] | None:
    """Return two names of one module, None if there are none."""
    seen: dict[str, dict[str, _Found]] = {}
    for item in inputs:
        for module, change in item.adapter.modules.items():
            for place, spelling in _places(module, change.layer):
                known = seen.setdefault(place, {})
                if spelling not in known:
                    known[spelling] = (item, module)
    for spellings in seen.values():
        if len(spellings) > 1:
            one, other = list(spellings.values())[:2]
            return one, other
    return None


def _called(item: MergeInput, module: str, other: str) -> str:
    """Return a module for a message, with the parameter that it is of if the other has its name."""
    parameters = item.adapter.modules[module].layer.parameters
    return f"{module} of {', '.join(parameters)}" if module == other and parameters else module


def _places(module: str, layer: Layer) -> Iterator[tuple[str, str]]:
    """Yield what a module is about, and how it is spelled there."""
    name = unwrapped(module)
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _NEUTRAL:
        del parts[0]
    loose = ".".join(parts)
    yield from _parameters(module, layer)
    experts = _EXPERTS.fullmatch(loose)
    if experts is not None:
        single = re.match(r"\.\d+\.", experts["rest"]) is not None
        of_mlx = experts["kind"] != "experts" or _PROJECTION.fullmatch(experts["rest"])
        stacked = "stacked" if layer.parameters and not of_mlx else experts["kind"]
        kind = "single" if single else stacked
        head = module.partition(experts["kind"])[0]
        yield f"{experts['layer']} experts", f"{kind} {head}"
        return
    numbered = _NUMBERED.match(loose) if layer.kind == "experts" else None
    if numbered is not None:
        yield f"{numbered[0]} experts", f"stack of {loose.rpartition('.')[0]}"
        return
    yield loose, module
    parent, _, leaf = loose.rpartition(".")
    for fused in _FUSED.get(leaf, ()):
        yield f"{parent} {fused}", "apart"
    if leaf in _TOGETHER:
        yield f"{parent} {leaf}", "together"


def _parameters(module: str, layer: Layer) -> Iterator[tuple[str, str]]:
    """Yield which parameter a module is of, and back: one alone has the name of the last of two."""
    if layer.kind != "experts" or len(layer.parameters) != 1:
        return
    leaf = layer.parameters[0].rpartition(".")[2]
    if leaf == "weight":  # a module of its own
        return
    yield f"{owner(module)} {leaf}", f"{module}"
    yield f"{module} is", leaf
