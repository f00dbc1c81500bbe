"""What every reader checks of a tensor before it takes it for a factor."""

from __future__ import annotations

from pathlib import Path

from loratools_formats.errors import AdapterError
from loratools_formats.tensors import TensorRef

_MAX_FACTOR_ELEMENTS = 1 << 29


def check_factor(tensor: TensorRef, path: Path) -> None:
    """Refuse a tensor that cannot be a factor: no real numbers, nothing in it, or too much.

    Raises:
        AdapterError: it cannot.
    """
    if not tensor.dtype.floating:
        raise AdapterError(
            "adapter factor is not of a floating-point type",
            path=path,
            tensor=tensor.key,
            got=tensor.dtype.code,
        )
    if tensor.numel == 0:
        raise AdapterError(
            "adapter factor is empty",
            path=path,
            tensor=tensor.key,
            got=list(tensor.shape),
            hint="Sharded training saves such files when the shards were not gathered",
        )
    if tensor.numel > _MAX_FACTOR_ELEMENTS:
        raise AdapterError(
            "adapter factor is too large",
            path=path,
            tensor=tensor.key,
            got=list(tensor.shape),
            expected=f"at most {_MAX_FACTOR_ELEMENTS} elements",
        )
