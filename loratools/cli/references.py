"""Adapters as a command line names them: PATH or PATH:WEIGHT; a path may be a reference."""

from __future__ import annotations

import math
from pathlib import Path

from loratools.hub.references import path_of
from loratools_formats.disk.errors import OptionError


def weighted_path(text: str) -> tuple[Path, float]:
    """Read PATH or PATH:WEIGHT, the weight 1 by default; an existing path wins.

    >>> weighted_path("hf://me/chat"), weighted_path("hf://me/chat@v1:0.3")
    ((PosixPath('hf:/me/chat'), 1.0), (PosixPath('hf:/me/chat@v1'), 0.3))

    Raises:
        OptionError: the path is empty, or what follows the colon is not a finite number.
    """
    path, separator, weight = text.rpartition(":")
    if not text or (separator and not path):
        raise OptionError("path of the adapter is empty", got=repr(text), expected="ADAPTER:NUMBER")
    # What follows the colon of hf:// or https:// is no weight.
    if not separator or weight.startswith("/") or Path(text).exists():
        return path_of(text), 1.0
    try:
        value = float(weight)
    except ValueError as error:
        raise OptionError("not a weight", got=weight, expected="ADAPTER:NUMBER") from error
    if not math.isfinite(value):
        raise OptionError("not a finite weight", got=weight)
    return path_of(path), value
