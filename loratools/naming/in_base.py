"""Where a base checkpoint has the modules of a single file: whole, cut, or several one by one.

The base may have the other naming of the architecture, and fuse or split what the file does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loratools.naming.base_modules import BaseModules
from loratools.naming.choice import chosen_tables
from loratools.naming.named_modules import NamedModules
from loratools.naming.places import dotted_name
from loratools.naming.tables import Place, Scheme, Table, filled
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.single_file_keys import Naming
from loratools_formats.disk.errors import LoratoolsError

_WAYS: tuple[tuple[Naming, Scheme], ...] = (("comfyui", "original"), ("diffusers", "diffusers"))


class BaseRows(NamedTuple):
    """Some rows of one of the base's modules, counted in equal parts of its rows."""

    module: str
    start: int = 0
    stop: int = 1
    of: int = 1

    @property
    def is_whole(self) -> bool:
        """Whether they are all of its rows."""
        return self.stop - self.start == self.of


def rows_in_base(adapter: Adapter, base: Checkpoint) -> dict[str, tuple[BaseRows, ...]]:
    """Return what each module of an adapter is in the base, its rows one after another.

    A module that the base does not have, or that is not of a single file, is the base's of that
    name.
    """
    found: dict[str, tuple[BaseRows, ...]] = {name: (BaseRows(name),) for name in adapter.modules}
    if get_format(adapter.format).naming is None:
        return found
    modules = BaseModules(base)
    direct = modules.found(adapter)
    if found.keys() - direct.keys():
        found |= _in_other_naming(adapter, modules)
    return found | {name: (BaseRows(direct[name]),) for name in found.keys() & direct.keys()}


def _in_other_naming(adapter: Adapter, modules: BaseModules) -> dict[str, tuple[BaseRows, ...]]:
    file = NamedModules.of(adapter)
    base = modules.full_names()
    found: dict[str, tuple[BaseRows, ...]] = {}
    for way, scheme in _WAYS:
        try:
            tables = chosen_tables([file], way, base)
        except LoratoolsError:
            continue
        for name in adapter.modules if tables else ():
            place = file.place(name, tables[0])
            if isinstance(place, Place):
                rows = _rows(place, scheme, tables[0], modules)
                if rows:
                    found.setdefault(name, rows)
    return found


def _rows(place: Place, scheme: Scheme, table: Table, modules: BaseModules) -> tuple[BaseRows, ...]:
    """Return the rows of the base that a place has in a naming; empty if the base lacks some."""
    names = place.row.names(scheme)
    component = place.component or table.component
    stored = [
        modules.full(dotted_name(filled(name, place.numbers), component, scheme)) for name in names
    ]
    parts = place.row.parts
    rows: tuple[BaseRows, ...]
    if len(names) == 1:
        (whole,) = stored
        if whole is None:
            return ()
        first, last = place.covered[0], place.covered[-1]
        rows = (BaseRows(whole, sum(parts[:first]), sum(parts[: last + 1]), sum(parts)),)
    else:
        owns = [stored[part] for part in place.covered]
        rows = tuple(BaseRows(own) for own in owns if own is not None)
        if len(rows) < len(owns):
            return ()
    if place.row.swapped_halves and (place.scheme == "diffusers") != (scheme == "diffusers"):
        rows = tuple(half for each in rows for half in _swapped(each))
    return rows


def _swapped(rows: BaseRows) -> Iterator[BaseRows]:
    middle = rows.start + rows.stop
    yield BaseRows(rows.module, middle, 2 * rows.stop, 2 * rows.of)
    yield BaseRows(rows.module, 2 * rows.start, middle, 2 * rows.of)
