"""What an extraction does with tensors that only one of the checkpoints has."""

from __future__ import annotations

from loratools.base.placement import rules


def saved_module(key: str) -> str:
    """Return the module that PEFT saves whole for a tensor: all of a head, or a single module."""
    first = key.partition(".")[0]
    return first if first in rules.TASK_HEADS else key.rpartition(".")[0]
