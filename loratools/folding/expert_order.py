"""Stacked experts read in another order of lora_B's columns than the file was taken to have.

The reader takes the order from markers, or guesses it. Whoever knows better says so, and the
factors are put into that order: bytes move and no value changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools_formats.core.adapter import Adapter, ExpertLayout
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.peft_facts import B_LAYOUT, EXPERT_MAJOR, RANK_MAJOR
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import OptionError

_GROUPED = {RANK_MAJOR: False, EXPERT_MAJOR: True}
_ABOUT_ORDER = ("expert-order-guessed", "expert-order-doubtful", "experts-grouped")


def overruled(adapter: Adapter, given: Mapping[str, Any]) -> tuple[Adapter, dict[str, Any]]:
    """Return an adapter in the order that settings state, and the other settings.

    Args:
        adapter: as read.
        given: settings by name; `lora_B_layout` may be one.

    Raises:
        OptionError: the order is not known, or the adapter has no stacked experts.
    """
    rest = {key: value for key, value in given.items() if key != B_LAYOUT}
    if B_LAYOUT not in given:
        return adapter, rest
    order = given[B_LAYOUT]
    if order not in _GROUPED:
        raise OptionError(
            f"{B_LAYOUT} has no such value", got=order, expected=" or ".join(_GROUPED)
        )
    modules = {name: _ordered(c, grouped=_GROUPED[order]) for name, c in adapter.modules.items()}
    if not any(_is_flat(change) for change in modules.values()):
        raise OptionError(
            f"{B_LAYOUT} is about stacked experts, and the adapter has none",
            path=adapter.source,
            got=None if adapter.expert_layout is None else adapter.expert_layout.described,
        )
    columns = "expert by expert" if _GROUPED[order] else "rank by rank"
    return replace(
        adapter,
        modules=modules,
        findings=tuple(each for each in adapter.findings if each.code not in _ABOUT_ORDER),
        expert_layout=ExpertLayout("stacked", f"lora_B {columns} (as was said)"),
    ), rest


def _is_flat(change: ModuleChange) -> bool:
    return change.factors is not None and change.layer.kind == "experts"


def _ordered(change: ModuleChange, *, grouped: bool) -> ModuleChange:
    if not _is_flat(change) or change.layer.grouped == grouped:
        return change
    part = change.require_factors()
    layer = replace(part.layer, grouped=grouped)
    return change.with_direction(replace(part, b=_read_anew(part.b, grouped=grouped), layer=layer))


def _read_anew(b: TensorRef, *, grouped: bool) -> TensorRef:
    """Return (E, out, r) as the file's columns give it in the other order."""
    experts, out, rank = b.shape
    if grouped:
        stored = b.transposed((1, 2, 0)).reshaped((out, experts, rank))
        return stored.transposed((1, 0, 2))
    stored = b.transposed((1, 0, 2)).reshaped((out, rank, experts))
    return stored.transposed((2, 0, 1))
