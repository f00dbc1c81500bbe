"""An adapter's deltas carried through a table: renamed, split, fused, halves swapped."""

from __future__ import annotations

from collections.abc import Mapping

from loratools.naming.named_modules import NamedModules
from loratools.naming.places import (
    Target,
    TextPlace,
    dotted_name,
    prefixed,
    target_scheme,
    text_name,
)
from loratools.naming.restructure import fused, is_rounding, rows_of, swapped_halves, units
from loratools.naming.tables import Place, Row, Table, filled
from loratools_formats.core.adapter import Adapter, Addition
from loratools_formats.core.change import KindDelta, ModuleChange
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_Group = dict[tuple[int, ...], tuple[Place, str, ModuleChange]]


class Crossing:
    """One adapter on its way through a table.

    Args:
        source: the adapter.
        file: its modules, and what each is called, component included.
        target: the naming it goes to.
        table: of its architecture; locates every name.
        expert: the component that original names are of; the table's first by default.

    Attributes:
        dotted: for every new name that is flattened, the dotted one.
        split: the new names of pieces of what was one module.
        exact: by new name, in float64, the modules whose values are rounded where they are fused.
    """

    def __init__(
        self,
        source: Adapter,
        file: NamedModules,
        target: Target,
        table: Table,
        expert: str | None = None,
    ) -> None:
        self._source = source
        self._file = file
        self._target: Target = target
        self._table = table
        self._expert = expert or table.component
        self._scheme = target_scheme(target, table)
        self.dotted: dict[str, str] = {}
        self.split: set[str] = set()
        self.exact: dict[str, ModuleChange] = {}

    def modules(self) -> dict[str, ModuleChange]:
        """Return the modules under their new names.

        Raises:
            AdapterError: two modules become one, or rows do not divide.
            UnsupportedError: a kind that cannot be split or joined.
        """
        return self._all(self._source.modules)

    def additions(self) -> dict[str, Addition]:
        """Return the additions to biases and norms, by their new targets."""
        result: dict[str, Addition] = {}
        by_leaf: dict[str, dict[str, ModuleChange]] = {}
        for addition in self._source.additions.values():
            module, _, leaf = addition.target.rpartition(".")
            by_leaf.setdefault(leaf, {})[module] = _as_delta(addition)
        for leaf, vectors in sorted(by_leaf.items()):
            for name, delta in self._all(vectors).items():
                target = f"{name}.{leaf}"
                result[target] = Addition(target, _as_tensor(delta))
        return result

    def _all(self, deltas: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
        result: dict[str, ModuleChange] = {}
        groups: dict[tuple[Row, tuple[str, ...], str], _Group] = {}
        for name, delta in deltas.items():
            place = self._file.place(name, self._table)
            if isinstance(place, TextPlace):
                self._put(result, text_name(place, self._target), delta)
                self.dotted[text_name(place, "kohya")] = text_name(place, "diffusers")
            elif place is not None:
                component = place.component or self._expert
                group = groups.setdefault((place.row, place.numbers, component), {})
                if place.covered in group:
                    raise AdapterError(
                        "two modules are one in the other naming",
                        path=self._source.source,
                        tensor=name,
                        got=group[place.covered][1],
                    )
                group[place.covered] = (place, name, delta)
        for (row, numbers, component), group in groups.items():
            names = row.names(self._scheme)
            if self._scheme != "diffusers" and len(names) == 1:
                path = filled(names[0], numbers)
                self._name(result, path, component, self._as_one(path, component, row, group))
            else:
                for place, name, delta in group.values():
                    self._taken_apart(result, place, name, delta)
        return result

    def _name(
        self, result: dict[str, ModuleChange], path: str, component: str, delta: ModuleChange
    ) -> None:
        name = prefixed(path, self._target, component)
        self.dotted[name] = dotted_name(path, component, self._scheme)
        self._put(result, name, delta)

    def _put(self, result: dict[str, ModuleChange], name: str, delta: ModuleChange) -> None:
        if name in result:
            raise AdapterError(
                "two modules have one name in the other naming",
                path=self._source.source,
                tensor=name,
            )
        result[name] = delta

    def _as_one(self, path: str, component: str, row: Row, group: _Group) -> ModuleChange:
        (place, name, delta), *others = group.values()
        if others or len(place.covered) < len(row.parts):
            return self._fused(path, component, row, group)
        return swapped_halves(name, delta) if self._turns(place) else delta

    def _turns(self, place: Place) -> bool:
        """Return whether the halves of a module's outputs change places on the way."""
        is_between = (place.scheme == "diffusers") != (self._scheme == "diffusers")
        return place.row.swapped_halves and is_between

    def _taken_apart(
        self, result: dict[str, ModuleChange], place: Place, name: str, delta: ModuleChange
    ) -> None:
        row = place.row
        start, height = 0, 0
        if len(place.covered) > 1:
            height = units(name, _height(delta), [row.parts[part] for part in place.covered])
        for part in place.covered:
            stop = start + height * row.parts[part]
            piece = rows_of(name, delta, start, stop) if len(place.covered) > 1 else delta
            if self._turns(place):
                piece = swapped_halves(name, piece)
            component = place.component or self._expert
            path = filled(row.names(self._scheme)[part], place.numbers)
            self._name(result, path, component, piece)
            if len(place.covered) > 1:
                self.split.add(prefixed(path, self._target, component))
            start = stop

    def _fused(self, path: str, component: str, row: Row, group: _Group) -> ModuleChange:
        covered = sorted(group)
        if len({part for parts in covered for part in parts}) != sum(map(len, covered)):
            raise AdapterError("modules overlap in the other naming", tensor=path)
        _, name, first = group[covered[0]]
        height = units(name, _height(first), [row.parts[part] for part in covered[0]])
        starts = {parts[0]: parts for parts in covered}
        deltas: list[ModuleChange | None] = []
        heights: list[int] = []
        position = 0
        while position < len(row.parts):
            span = starts.get(position, (position,))
            deltas.append(group[span][2] if span in group else None)
            heights.append(height * sum(row.parts[part] for part in span))
            position += len(span)
        whole = fused(path, deltas, heights)
        if is_rounding(deltas):
            name = prefixed(path, self._target, component)
            self.exact[name] = fused(path, deltas, heights, exact=True)
        return whole


def _height(delta: ModuleChange) -> int:
    height = delta.shape[0]
    if height is None:
        raise UnsupportedError(
            "a weight change whose shape the file does not state cannot be renamed by a table",
            tensor=next((t.key for t in delta.tensors()), None),
        )
    return height


def _as_delta(addition: Addition) -> ModuleChange:
    """Return a vector as a matrix of one column, which is taken apart and put together alike."""
    tensor = addition.tensor
    return ModuleChange(KindDelta("full", {"diff": tensor}, shape=(tensor.shape[0], 1)))


def _as_tensor(delta: ModuleChange) -> TensorRef:
    if delta.kind_delta is None:
        raise TypeError("not a vector")
    return delta.kind_delta.parts["diff"]
