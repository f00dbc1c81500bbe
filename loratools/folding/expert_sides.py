"""On which side of stacked experts A is, where the file does not tell and the base does."""

from __future__ import annotations

from dataclasses import replace

from loratools.base.placement import rules
from loratools.base.placement.class_view import names_in_class
from loratools.base.placement.orient import stack_is_swapped, stack_is_transposed
from loratools.folding.base_layout import in_base_layout
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import model_types
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.orientation import exchanged

ASSUMED = "expert-side-assumed"
"""Code of the reader's finding about stacks whose side nothing but a release tells."""


def lacks_sides(adapter: Adapter) -> bool:
    """Return whether the file of an adapter leaves open on which side of some stack A is."""
    return bool(_unknown(adapter))


def with_sides(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter whose stacks say on which side A is, and square ones how the base has them.

    A stack that the base does not have, or of which it tells nothing, stays as it is.

    Raises:
        AdapterError: a stack fits the base's neither way.
    """
    unknown = _unknown(adapter)
    found = unknown | _of_open_class(adapter)
    if base is None or not found:
        return adapter
    names = names_in_class(base)
    modules = dict(adapter.modules)
    for name, part in found.items():
        (parameter,) = part.layer.parameters
        swapped = (
            stack_is_swapped(names, parameter, part) if name in unknown else part.layer.swapped
        )
        lies = None if names.find(parameter) is None else stack_is_transposed(names, parameter)
        layer = replace(part.layer, swapped=swapped)
        if swapped is not None and lies is not None:
            layer = replace(layer, transposed_if_square=swapped != lies)
        modules[name] = modules[name].with_direction(replace(part, layer=layer))
    told = replace(adapter, modules=modules)
    if lacks_sides(told):
        return told
    return replace(told, findings=tuple(f for f in adapter.findings if f.code != ASSUMED))


def _unknown(adapter: Adapter) -> dict[str, LowRank]:
    return {name: part for name, part in _stacks(adapter).items() if part.layer.swapped is None}


def _of_open_class(adapter: Adapter) -> dict[str, LowRank]:
    """Return square stacks of a known side, where PEFT's side of the class is not known."""
    return {
        name: part
        for name, part in _stacks(adapter).items()
        if part.layer.transposed_if_square is None and part.shape[0] == part.shape[1]
    }


def _stacks(adapter: Adapter) -> dict[str, LowRank]:
    return {
        name: change.factors
        for name, change in adapter.modules.items()
        if adapter.format == "peft"
        and change.factors is not None
        and change.layer.kind == "experts"
        and len(change.layer.parameters) == 1
    }


def straight_beside(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter as it lies in a base, with A of stacks on the inputs where that is known.

    Raises:
        UnsupportedError: a layout of its own, as GGUF has one, is not known.
        AdapterError: the base model is another one.
    """
    return straightened(with_sides(in_base_layout(adapter, base), base))


def straightened(adapter: Adapter) -> Adapter:
    """Return an adapter whose stacks have A on the inputs, but for those of an unknown side."""
    return _turned(adapter, swapped=True)


def on_side_of_peft(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter whose stacks have A on the outputs if PEFT has it there for this base.

    PEFT 0.19.1 and later have it there for Llama 4, whose class does not say how its experts lie.
    """
    is_unmarked = bool(frozenset(model_types(base.config)) & rules.UNMARKED_TRANSPOSED)
    return _turned(adapter, swapped=False) if is_unmarked else adapter


def _turned(adapter: Adapter, *, swapped: bool) -> Adapter:
    turned = {
        name: change.with_direction(exchanged(change.factors))
        for name, change in adapter.modules.items()
        if change.factors is not None
        and change.layer.kind == "experts"
        and change.layer.swapped is swapped
    }
    return replace(adapter, modules={**adapter.modules, **turned}) if turned else adapter


def turned_back(adapter: Adapter, before: Adapter) -> Adapter:
    """Return an adapter whose stacks have A on the outputs again where they had it before.

    Args:
        adapter: one whose stacks were straightened.
        before: it, before that; its sides are known.
    """
    modules = dict(adapter.modules)
    for name, change in adapter.modules.items():
        if change.factors is not None and before.modules[name].layer.swapped is True:
            modules[name] = change.with_direction(exchanged(change.factors))
    return replace(adapter, modules=modules)
