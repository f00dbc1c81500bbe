"""Where the arithmetic runs: NumPy on the CPU, or torch on an accelerator.

The CPU engine never imports torch: importing it takes longer than squeezing a 7B adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from loratools.work.declared import option
from loratools.work.parallel import Workers
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import MissingDependencyError, OptionError

DeviceName = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class Computing(Workers):
    """Where a run computes, and with how many threads.

    Attributes:
        device: where to compute; cuda and mps need torch.

    Raises:
        OptionError: the number of threads is out of range.
    """

    device: DeviceName = option("cpu", heading="Computing")

    @property
    def threads(self) -> int:
        """Threads to use over modules: one where a device does the work."""
        return self.workers if self.device == "cpu" else 1


class Device:
    """A device by name.

    Args:
        name: `cpu`, `cuda` or `mps`.

    Raises:
        MissingDependencyError: torch or array-api-compat is not installed.
        OptionError: torch finds no such device.
    """

    def __init__(self, name: DeviceName) -> None:
        self.name = name
        if name == "cpu":
            return
        try:
            import array_api_compat.torch  # noqa: F401
            import torch
        except ImportError as error:
            raise MissingDependencyError(
                f"device {name} needs torch", hint="pip install 'loratools[torch]'"
            ) from error
        backend = torch.cuda if name == "cuda" else torch.backends.mps
        if not backend.is_available():
            raise OptionError(f"torch finds no {name} device", expected="cpu")

    @property
    def has_float64(self) -> bool:
        """Whether the device computes in float64."""
        return self.name != "mps"

    def put(self, array: Array) -> Any:
        """Return the array on the device."""
        if self.name == "cpu":
            return array
        import torch

        values = array if self.has_float64 else array.astype(np.float32, copy=False)
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.name)


def to_numpy(array: Any) -> Array:
    """Return an array of any device as NumPy."""
    if isinstance(array, np.ndarray):
        return array
    result: Array = array.cpu().numpy()
    return result
