"""One trimming threshold for an adapter over all its modules, as the TIES paper has it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from loratools.operations.merge.align import AlignedModule
from loratools.operations.merge.module import pairs_of
from loratools.operations.merge.tasks import FactorRows, Histogram, Tasks, ZeroRows
from loratools_formats.disk.errors import UnsupportedError


class SharedTrim:
    """Thresholds of |ΔW| over all modules, found when first asked for.

    Args:
        modules: all of them; one that an adapter does not have counts as zeros.

    Raises:
        UnsupportedError: a DoRA takes part.
    """

    def __init__(self, modules: Sequence[AlignedModule]) -> None:
        if any(module.needs_base for module in modules):
            raise UnsupportedError(
                "trimming over all modules is not supported with DoRA", hint="Use `flavor=peft`"
            )
        self._modules = modules
        self._lock = threading.Lock()
        self._found: dict[tuple[int, float], float] = {}

    def threshold(self, task: int, density: float) -> float:
        """Return the magnitude of the last entry of a task that is kept."""
        with self._lock:
            key = (task, density)
            if key not in self._found:
                self._found[key] = self._select(task, density)
            return self._found[key]

    def _select(self, task: int, density: float) -> float:
        elements = sum(
            module.first.experts * module.first.shape[0] * module.first.shape[1]
            for module in self._modules
        )
        keep = int(density * elements)
        if keep <= 0:
            return float("inf")
        counts = Histogram()
        for values in self._magnitudes(task):
            counts.add_high(values)
        counts.choose(keep)
        for values in self._magnitudes(task):
            counts.add_low(values)
        return counts.value()

    def _magnitudes(self, task: int) -> Any:
        for module in self._modules:
            shape = module.first.shape
            delta = module.deltas[task]
            if delta is None:
                sources: list[Any] = [ZeroRows(shape[1])] * module.first.experts
            else:
                sources = [FactorRows(*pair) for pair in pairs_of(delta)]
            for source in sources:
                tasks = Tasks([source], shape, 0, module.name)
                for span in tasks.spans():
                    yield np.abs(source.rows(*span))
