"""The modules of one file under the names that a table of names is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratools.naming.places import (
    Target,
    TextPlace,
    is_located,
    located,
    names_at,
    original_spelling,
    text_name,
)
from loratools.naming.tables import Place, Shape, Table, bundled_tables
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError

UNKNOWN_SHAPE: Shape = (None, None)


@dataclass(frozen=True)
class NamedModules:
    """The modules of one file, as a table must know them.

    Attributes:
        names: what each is called, with its component, by its name in the adapter.
        shapes: of their weights, by the name in the adapter.
        metadata: of the file.
        source: the file, for messages.
        base_model: the base model's name, if recorded.
    """

    names: Mapping[str, str]
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    source: object = None
    base_model: str | None = None

    @classmethod
    def of(cls, adapter: Adapter, names: Mapping[str, str] | None = None) -> NamedModules:
        """Return the modules of an adapter, by default all of them under the names they have."""
        names = {name: name for name in all_names(adapter)} if names is None else names
        return cls(names, _shapes_of(adapter), adapter.metadata, adapter.source, adapter.base_model)

    def place(self, name: str, table: Table) -> Place | TextPlace | None:
        """Return where a module stands in a table, None if nowhere.

        Some trainers put diffusers' component before original names: diffusion-pipe before those of
        HunyuanVideo.
        """
        full, shape = self.names[name], self.shapes.get(name, UNKNOWN_SHAPE)
        place = located(full, table, shape)
        original = original_spelling(full, table) if place is None else None
        if original is None:
            return place
        place = located(original, table, shape)
        if not isinstance(place, Place):
            return place
        component = full.partition(".")[0]
        return replace(place, component=component if component in table.components else "")

    def has_foreign_prefixes(self) -> bool:
        """Return whether a name has diffusers' prefix before what only original namings have."""
        return any(
            any(self._is_foreign(name, table) for table in bundled_tables())
            for name, full in self.names.items()
            if not any(is_located(full, table) for table in bundled_tables())
        )

    def _is_foreign(self, name: str, table: Table) -> bool:
        return self._is_placed(name, table) and not is_located(self.names[name], table)

    def has_own_prefixes(self, table: Table) -> bool:
        """Return whether no name has diffusers' prefix before what is original in a table."""
        return not any(self._is_foreign(name, table) for name in self.names)

    def is_in(self, table: Table) -> bool:
        """Return whether a table has every module, and tells which it is."""
        return all(self._is_placed(name, table) for name in self.names)

    def missing(self, table: Table) -> list[str]:
        """Return the modules that a table does not have, or has in several places."""
        return [name for name in self.names if not self._is_placed(name, table)]

    def _is_placed(self, name: str, table: Table) -> bool:
        try:
            return self.place(name, table) is not None
        except OptionError:
            return False

    def places(self, table: Table) -> list[Place | TextPlace]:
        """Return where the modules stand that a table has."""
        found = (self.place(n, table) for n in self.names if self._is_placed(n, table))
        return [place for place in found if place is not None]

    def outcome(self, target: Target, table: Table) -> tuple[str, ...]:
        """Return what the modules are called in a target by a table, sorted."""
        found: list[str] = []
        for place in self.places(table):
            if isinstance(place, TextPlace):
                found.append(text_name(place, target))
            else:
                found += names_at(place, target, table)
        return tuple(sorted(found))


def _shapes_of(adapter: Adapter) -> dict[str, Shape]:
    """Return the (out, in) of every weight that is no convolution of several places."""
    return {
        name: delta.shape
        for name, delta in adapter.modules.items()
        if all(n == 1 for n in delta.layer.kernel)
    }


def all_names(adapter: Adapter) -> list[str]:
    """Return the names of all modules that are changed, by factors or otherwise."""
    added = [addition.target.rpartition(".")[0] for addition in adapter.additions.values()]
    return list(dict.fromkeys([*adapter.modules, *added]))
