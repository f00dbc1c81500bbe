"""The base weights that an adapter's modules change, as whole matrices in the modules' layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools.base.placement.changes import Placement
from loratools.base.placement.place import module_placements
from loratools.base.weights import find_base_module, is_in_stack, names_under
from loratools.folding.base_seen import seen_by
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


class WeightsBeside:
    """Finds and reads base weights by module.

    Args:
        adapter: whose modules they are.
        base: the base model.

    Raises:
        AdapterError: the base has two namings that fit, or none.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        seen = seen_by(adapter, base)
        self._names = names_under(adapter, seen.checkpoint, adapter.modules)
        self._in_base = seen.names
        self._path = base.path

    def load(self, name: str, change: ModuleChange) -> list[Array]:
        """Return the weight of each matrix of a module: (out, in) float64, one per expert.

        Raises:
            AdapterError: no tensor of the base fits the module, or it holds NaN or infinite values.
            UnsupportedError: a layout is ambiguous, or a kind without factors changes one expert
                of a stack.
        """
        within = self._in_base[name]
        if change.factors is None or not self._is_placed(within, change):
            weight = find_base_module(self._names, within, change.direction).weight()
            return [weight.rows(0, weight.shape[0])]
        placed = module_placements(self._names, within, change)
        if not placed:
            raise AdapterError("no base tensor fits the module", path=self._path, tensor=name)
        if placed[0].expert is None and change.factors.layer.kind == "experts":
            planes = range(change.factors.experts)
            return [self._joined([replace(placed[0], plane=i)], change) for i in planes]
        experts = {one.expert: None for one in placed}
        return [self._joined([p for p in placed if p.expert == i], change) for i in experts]

    def _is_placed(self, within: str, change: ModuleChange) -> bool:
        """Return whether the module is of stacked experts, or one of them."""
        return bool(change.layer.parameters) or is_in_stack(self._names, within)

    def _joined(self, placed: list[Placement], change: ModuleChange) -> Array:
        """Return one matrix from the tensors that hold its outputs, as the change lies."""
        found = placed[0].delta.require_factors()
        whole = np.empty(found.shape)
        for one in placed:
            stored = self._matrix(one.key, one.plane)
            matrix = stored.T if one.transposed else stored
            parts = [matrix[start:stop] for start, stop in one.outputs] or [matrix]
            spans = one.rows or ((0, len(whole)),)
            values = np.concatenate(parts)
            top = 0
            for start, stop in spans:
                whole[start:stop] = values[top : top + stop - start]
                top += stop - start
        # The change of experts that lie the other way round was turned to find its place.
        return whole if found is change.factors else whole.T

    def _matrix(self, key: str, plane: int | None) -> Array:
        stored = self._names.tensors[key]
        rows, columns = stored.shape[-2:]
        size, first = rows * columns, (plane or 0) if len(stored.shape) == 3 else 0
        values = stored.elements(first * size, (first + 1) * size).astype(np.float64)
        if not np.isfinite(values).all():
            raise AdapterError("base weight holds NaN or infinite values", tensor=key)
        matrix: Array = values.reshape(rows, columns)
        return matrix
