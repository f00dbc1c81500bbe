"""Which names of adapters mean one module, as far as it is known without the base.

Names that differ by wrappers alone are of one module: `model.layers.0` and
`model.language_model.layers.0` of a model before and after transformers 4.52. Of fused and split
projections, and of stacked and single experts, nobody can tell without the base whether a model
has both, and how rows divide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from loratools.base.placement import rules
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer
from loratools_formats.core.peft_facts import owner
from loratools_formats.core.wrapped_names import unwrapped

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
_BY_NUMBER = frozenset({"w1", "w2", "w3", "v1"})
_GATE_AND_UP = frozenset({"gate_proj", "up_proj", "w1", "w3"})
"""Of single experts, where these are two modules."""
_NUMBERED = re.compile(r"(?:.*?\.)?\d+(?=\.)")
_NEUTRAL = rules.NEUTRAL | {"thinker"}


Found = tuple[int, str]
"""Number of an adapter, and a module's name in it."""


def loose_name(module: str) -> str:
    """Return a module's name without leading parts that name no part of a model of their own.

    >>> loose_name("model.language_model.layers.0.mlp.up_proj")
    'layers.0.mlp.up_proj'
    """
    parts = unwrapped(module).split(".")
    while len(parts) > 1 and parts[0] in _NEUTRAL:
        del parts[0]
    return ".".join(parts)


def loosely_named(adapter: Adapter) -> Adapter:
    """Return an adapter under loose names; under its own ones if two modules would become one."""
    names = {name: loose_name(name) for name in adapter.modules}
    if len(set(names.values())) < len(names):
        return adapter
    return replace(adapter, modules={names[n]: c for n, c in adapter.modules.items()})


def as_first_spells(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return adapters whose names that differ by wrappers alone are those of the first to have one.

    They are returned as they are where two modules of one adapter would become one.
    """
    spelled: dict[str, str] = {}
    for adapter in adapters:
        loose = [loose_name(name) for name in adapter.modules]
        if len(set(loose)) < len(loose):
            return list(adapters)
        for short, name in zip(loose, adapter.modules, strict=True):
            spelled.setdefault(short, name)
    return [
        replace(a, modules={spelled[loose_name(name)]: c for name, c in a.modules.items()})
        for a in adapters
    ]


def name_clash(adapters: Sequence[Adapter]) -> tuple[Found, Found] | None:
    """Return two names of one module, None if there are none."""
    seen: dict[str, dict[str, Found]] = {}
    for number, adapter in enumerate(adapters):
        for module, change in adapter.modules.items():
            for place, spelling in _places(module, change.layer):
                known = seen.setdefault(place, {})
                if spelling not in known:
                    known[spelling] = (number, module)
    for spellings in seen.values():
        if len(spellings) > 1:
            one, other = list(spellings.values())[:2]
            return one, other
    return _of_bodies(adapters)


def _of_bodies(adapters: Sequence[Adapter]) -> tuple[Found, Found] | None:
    """Return two names that differ by one leading part, such as `bert.`; None if there are none.

    A body that is saved without its heads lacks that part. An adapter that has both names has two
    modules of them.
    """
    loose = [{loose_name(module): module for module in adapter.modules} for adapter in adapters]
    for first, longer in enumerate(loose):
        for second, shorter in enumerate(loose):
            for name, module in longer.items() if first != second else ():
                tail = name.partition(".")[2]
                both = tail in longer or name in shorter
                if tail in shorter and not both and _NUMBERED.match(tail):
                    return (first, module), (second, shorter[tail])
    return None


def called(adapter: Adapter, module: str, other: str) -> str:
    """Return a module for a message, with the parameter that it is of if the other has its name."""
    parameters = adapter.modules[module].layer.parameters
    return f"{module} of {', '.join(parameters)}" if module == other and parameters else module


def _places(module: str, layer: Layer) -> Iterator[tuple[str, str]]:
    """Yield what a module is about, and how it is spelled there."""
    loose = loose_name(module)
    yield from _parameters(module, layer)
    experts = _EXPERTS.fullmatch(loose)
    if experts is not None:
        single = re.match(r"\.\d+\.", experts["rest"]) is not None
        of_mlx = experts["kind"] != "experts" or _PROJECTION.fullmatch(experts["rest"])
        stacked = "stacked" if layer.parameters and not of_mlx else experts["kind"]
        kind = "single" if single else stacked
        head = module.partition(experts["kind"])[0]
        yield f"{experts['layer']} experts", f"{kind} {head}"
        if single:
            yield from _of_single(experts["layer"], loose.rpartition(".")[2])
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


def _of_single(layer: str, leaf: str) -> Iterator[tuple[str, str]]:
    """Yield how a single expert's projection is called, and whether gate and up are one."""
    yield f"{layer} projections", "by number" if leaf in _BY_NUMBER else "by name"
    if leaf in _GATE_AND_UP:
        yield f"{layer} gate and up", "apart"
    if leaf == "gate_up_proj":
        yield f"{layer} gate and up", "together"


def _parameters(module: str, layer: Layer) -> Iterator[tuple[str, str]]:
    """Yield which parameter a module is of, and back: one alone has the name of the last of two."""
    if layer.kind != "experts" or len(layer.parameters) != 1:
        return
    leaf = layer.parameters[0].rpartition(".")[2]
    if leaf == "weight":  # a module of its own
        return
    yield f"{owner(module)} {leaf}", f"{module}"
    yield f"{module} is", leaf
