"""The base weights that an adapter's modules change, as whole matrices in the modules' layout."""

from __future__ import annotations

import numpy as np

from loratools.base.placement.experts import expert_placements
from loratools.base.weights import find_base_module, names_under
from loratools.naming.for_base import names_in_base
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter, ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError, UnsupportedError


class WeightsBeside:
    """Finds and reads base weights by module.

    Args:
        adapter: whose modules they are.
        base: the base model.

    Raises:
        AdapterError: the base has two namings that fit, or none.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint) -> None:
        self._names = names_under(adapter, base, adapter.modules)
        self._in_base = names_in_base(adapter, base)
        self._path = base.path

    def load(self, name: str, change: ModuleChange) -> list[Array]:
        """Return the weight of each matrix of a module: (out, in) float64, one per expert.

        Raises:
            AdapterError: no tensor of the base fits the module, or it holds NaN or infinite values.
            UnsupportedError: the base keeps the experts of a stack apart, or an expert in a stack.
        """
        if change.layer.parameters:
            return self._stack(name, change)
        weight = find_base_module(self._names, self._in_base[name], change.direction).weight()
        return [weight.rows(0, weight.shape[0])]

    def _stack(self, name: str, change: ModuleChange) -> list[Array]:
        placed = expert_placements(self._names, name, change)
        if not placed:
            raise AdapterError("no base tensor fits the module", path=self._path, tensor=name)
        if len(placed) > 1:
            raise UnsupportedError(
                "the base has the experts of this stack in tensors of their own",
                path=self._path,
                tensor=name,
            )
        stored = self._names.tensors[placed[0].key].load(np.float64)
        if not np.isfinite(stored).all():
            raise AdapterError("base weight holds NaN or infinite values", tensor=placed[0].key)
        planes = stored if stored.ndim == 3 else stored[None]
        return [plane.T if placed[0].transposed else plane for plane in planes]
