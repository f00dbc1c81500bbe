"""Modules taken out of an adapter before anything else is done with it.

Everything that the file holds of a module leaves with it: its factors, what it adds to a bias, what
it replaces, what is carried under its name. What leaves is only looked at to say how much of the
change it was, so that a module of NaN can be taken out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.algebra.device import Device
from loratools.algebra.row_blocks import RowSource
from loratools.base.shape_only import ShapeOnly
from loratools.folding.decomposed import rows_of
from loratools.folding.module import checked_form, known_shape
from loratools.folding.without_base import folds_alone
from loratools.lowrank.matrices import matrices
from loratools.work.selection import Dropping
from loratools_formats.contract.commands import module_paths_hint
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import KindDelta, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import without_gaps
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, LoratoolsError, OptionError, and_more


def without_modules(adapters: Sequence[Adapter], dropping: Dropping) -> list[Adapter]:
    """Return adapters without the modules that are to leave.

    Args:
        adapters: which an operation takes together.
        dropping: which modules leave.

    Raises:
        OptionError: a pattern to drop finds nothing in any of them.
        AdapterError: nothing is left of one.
    """
    if not dropping.is_given:
        return list(adapters)
    names = [name for adapter in adapters for name in _names(adapter)]
    only_drop = Dropping(drop=dropping.drop)
    if dropping.drop is not None and not any(name in only_drop for name in names):
        raise OptionError(
            "the pattern to drop finds no module",
            got=dropping.drop,
            expected=f"such as {names[0]}" if names else None,
            hint=module_paths_hint(adapters[0].source),
        )
    return [_without(adapter, dropping) for adapter in adapters]


def _names(adapter: Adapter) -> list[str]:
    """Return what patterns are searched in: paths of modules, and keys of what is carried."""
    targets = [
        *(addition.target for addition in adapter.additions.values()),
        *(replacement.target for replacement in adapter.replacements.values()),
    ]
    paths = [*adapter.modules, *map(_module_of, targets), *adapter.carried]
    return list(dict.fromkeys(paths))


def _module_of(target: str) -> str:
    return target.rpartition(".")[0] or target


def _without(adapter: Adapter, dropping: Dropping) -> Adapter:
    gone = [name for name in _names(adapter) if name in dropping]
    if not gone:
        return adapter
    left = set(gone)
    modules = without_gaps(
        {name: change for name, change in adapter.modules.items() if name not in left}
    )
    additions = {k: a for k, a in adapter.additions.items() if _module_of(a.target) not in left}
    replacements = {
        k: r for k, r in adapter.replacements.items() if _module_of(r.target) not in left
    }
    if not modules and not additions and not replacements:
        raise AdapterError(
            "no module would be left",
            path=adapter.source,
            got=f"all {len(_names(adapter))} leave by " + _patterns(dropping),
            hint=module_paths_hint(adapter.source),
        )
    kept = replace(
        adapter,
        modules=modules,
        shared=_still_shared(adapter, modules),
        additions=additions,
        replacements=replacements,
        carried={k: t for k, t in adapter.carried.items() if k not in left},
        findings=(
            *(each for each in adapter.findings if each.where not in left),
            Finding("dropped-modules", "note", _patterns(dropping), _told(adapter, gone)),
        ),
    )
    return replace(kept, config=get_format(adapter.format).narrowed_config(kept))


def _patterns(dropping: Dropping) -> str:
    return " and ".join(f"{name} {pattern}" for name, pattern in dropping.record().items())


def _still_shared(adapter: Adapter, modules: Mapping[str, ModuleChange]) -> dict[str, TensorRef]:
    """Return the shared tensors but those that only modules which leave are made of."""

    def used(changes: Mapping[str, ModuleChange]) -> set[str]:
        deltas = (change.kind_delta for change in changes.values())
        return {t.key for delta in deltas if delta is not None for t in delta.shared.values()}

    idle = used(adapter.modules) - used(modules)
    return {key: t for key, t in adapter.shared.items() if t.key not in idle}


def _told(adapter: Adapter, gone: Sequence[str]) -> str:
    """Return the sentence on what left and how much of the change it was."""
    energies = {name: _energy(name, change) for name, change in adapter.modules.items()}
    known = {name: energy for name, energy in energies.items() if energy is not None}
    whole, lost = sum(known.values()), sum(known.get(name, 0.0) for name in gone)
    text = f"taken out: {and_more(gone)}"
    if any(name in known for name in gone):
        text += f"; {lost / whole if whole else 0.0:.2%} of the energy ‖ΔW‖²"
    unknown = [name for name in energies if name not in known]
    if unknown:
        text += f"; the energy of {and_more(unknown)} is not known"
    return text


def _energy(name: str, change: ModuleChange) -> float | None:
    """Return ‖ΔW‖²_F; None if the base is needed for it, or values are not finite."""
    if change.is_dora:
        return None
    try:
        if change.factors is not None:
            found = sum(m.squared_norm for m in matrices(change.factors, Device("cpu")))
        elif folds_alone(change) and change.kind_delta is not None:
            found = sum(_energy_of_form(name, plane) for plane in change.kind_delta.planes())
        else:
            return None
    except LoratoolsError:
        return None
    return found if math.isfinite(found) else None


def _energy_of_form(name: str, delta: KindDelta) -> float:
    rows = rows_of(checked_form(name, delta, ShapeOnly(known_shape(delta))))
    return RowSource(rows.shape, rows.rows).squared_norm
