"""Squeezing while training: PEFT models on torch, by hand or under transformers' Trainer.

It needs torch, peft and transformers (extra `train`), which nothing else of this package imports at
its start. `squeeze_model` squeezes a live model, `SqueezeCallback` does so at the boundaries of a
`SqueezeSchedule`, and `collect_stats` measures the inputs that a calibrated squeeze of the saved
adapter takes.
"""

from __future__ import annotations

from loratools.operations.schedule import SqueezeSchedule
from loratools_formats.disk.errors import MissingDependencyError

try:
    from loratools.training.callback import SqueezeCallback
    from loratools.training.live import SqueezedModel, squeeze_model
    from loratools.training.stats import CollectedStats, collect_stats
except ImportError as error:
    raise MissingDependencyError(
        f"squeezing while training needs {error.name}", hint="pip install 'loratools[train]'"
    ) from error

__all__ = [
    "CollectedStats",
    "SqueezeCallback",
    "SqueezeSchedule",
    "SqueezedModel",
    "collect_stats",
    "squeeze_model",
]
