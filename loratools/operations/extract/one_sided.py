"""What an extraction does with tensors that only one of the checkpoints has."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loratools.base.placement import rules


def saved_module(key: str) -> str:
    """Return the module that PEFT saves whole for a tensor: all of a head, or a single module."""
    first = key.partition(".")[0]
    return first if first in rules.TASK_HEADS else key.rpartition(".")[0]


def pattern_of(modules: Iterable[str], shared: set[str]) -> str:
    """Return an expression for modules, and for none of those that are `shared`."""
    own: dict[str, None] = {}
    for module in modules:
        parts = module.split(".")
        starts = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        free = (s for s in starts if not any(f"{o}.".startswith(f"{s}.") for o in shared))
        start = next(free, None)
        own[rf"{re.escape(start)}(\.|$)" if start else f"{re.escape(starts[-1])}$"] = None
    return f"^({'|'.join(own)})" if len(own) > 1 else f"^{next(iter(own))}"
