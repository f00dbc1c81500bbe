"""One trimming threshold for an adapter over all its modules, as the TIES paper has it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from loratools.operations.merge.align import AlignedModule
from loratools.operations.merge.module import pairs_of
from loratools.operations.merge.selection import SAMPLE, largest
from loratools.operations.merge.tasks import FactorRows, Tasks, ZeroRows
from loratools_formats.core.dtypes import Array
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
        sample = self._sample(task, elements) if elements >= SAMPLE else None
        return largest(lambda look: self._looked_at(task, look), [keep], sample, elements)[0]

    def _sample(self, task: int, elements: int) -> Array:
        """Return magnitudes at random places, as many of each matrix as it has a share of all."""
        drawn = [np.empty(0, np.float32)]
        owed = 0.0
        for source, shape in self._sources(task):
            owed += SAMPLE * shape[0] * shape[1] / elements
            count = int(owed)
            owed -= count
            is_zero = isinstance(source, ZeroRows)
            drawn.append(np.zeros(count, np.float32) if is_zero else source.sample(count))
        return np.concatenate(drawn)

    def _looked_at(self, task: int, look: Callable[[Array], Any]) -> Iterator[Any]:
        """Yield what a function returns of each block of magnitudes."""
        for source, shape in self._sources(task):
            tasks = Tasks([source], shape, 0, "")
            yield from tasks.blocks(tasks.magnitudes(0))(look)

    def _sources(self, task: int) -> Iterator[tuple[Any, tuple[int, int]]]:
        for module in self._modules:
            shape = module.first.shape
            delta = module.deltas[task]
            if delta is None:
                yield from [(ZeroRows(shape[1]), shape)] * module.first.experts
            else:
                for pair in pairs_of(delta):
                    yield FactorRows(*pair), shape
