"""Memory that a thread uses again and again: fresh arrays cost page faults, block after block."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np

from loratools_formats.core.dtypes import Array


class Buffers(threading.local):
    """Arrays by name, different ones in each thread."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array of any content; the next one of that name gets the same memory."""
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.nbytes < nbytes:
            held = self._held[name] = np.empty(nbytes, np.uint8)
        array: Array = held[:nbytes].view(dtype).reshape(shape)
        return array
