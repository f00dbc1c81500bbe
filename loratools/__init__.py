"""Tools for LoRA adapter files: exact operations on the true weight change ΔW, in factor space.

Importing this package imports nothing heavy; names below load their module when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdapterInfo": "loratools.info",
    "RankRule": "loratools.ranks",
    "SqueezeResult": "loratools.squeeze",
    "describe": "loratools.info",
    "squeeze": "loratools.squeeze",
    "read_adapter": "loratools_formats",
    "write_adapter": "loratools_formats",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 - the keys are strings


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
