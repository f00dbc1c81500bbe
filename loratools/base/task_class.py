"""What a model's class was made for, as far as PEFT's adapters bring a head for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ENDING_OF_TASK = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""By PEFT's `task_type`, how the names of transformers' classes end."""


def task_of(config: Mapping[str, Any]) -> str | None:
    """Return PEFT's name of a classifier's task from its config.json; None of other models."""
    classes = config.get("architectures")
    names = classes if isinstance(classes, list) else []
    found = (
        task
        for task, ending in ENDING_OF_TASK.items()
        for name in names
        if isinstance(name, str) and name.endswith(ending)
    )
    return next(found, None)
