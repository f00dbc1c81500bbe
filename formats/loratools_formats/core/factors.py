"""What readers check of factors, and how writers store them in another type."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, ModuleChange
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.nothing import NOT_GATHERED
from loratools_formats.core.tensors import TensorRef, rounded
from loratools_formats.disk.errors import AdapterError

_MAX_FACTOR_ELEMENTS = 1 << 29
_LARGEST_WHOLE = 1 << 53  # above, float64 has no other numbers, and JSON's readers differ


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
            hint=NOT_GATHERED,
        )
    if tensor.numel > _MAX_FACTOR_ELEMENTS:
        raise AdapterError(
            "adapter factor is too large",
            path=path,
            tensor=tensor.key,
            got=list(tensor.shape),
            expected=f"at most {_MAX_FACTOR_ELEMENTS} elements",
        )


NOT_FINITE = "factor holds NaN or infinite values"
"""What errors say of it, by which a run tells how to go on without the module."""


def check_magnitude(magnitude: TensorRef, outputs: int, path: Path | None = None) -> None:
    """Refuse a DoRA's magnitude that has not one number for each output.

    Raises:
        AdapterError: it has more or fewer.
    """
    if magnitude.numel != outputs:
        raise AdapterError(
            "magnitude does not fit the module",
            path=path,
            tensor=magnitude.key,
            got=list(magnitude.shape),
            expected=f"{outputs} elements",
        )


def flattened_convolution(
    a: TensorRef, b: TensorRef, path: Path
) -> tuple[TensorRef, TensorRef, Layer]:
    """Return the factors of a convolution as matrices, and its layer.

    Args:
        a: (r, in, *kernel).
        b: (out, r, 1, …), of as many dimensions.
        path: the file, for messages.

    Raises:
        AdapterError: the second factor has a kernel of its own.
    """
    if b.shape[2:] != (1,) * (len(a.shape) - 2):
        raise AdapterError(
            "convolution's second factor must have a kernel of ones",
            path=path,
            tensor=b.key,
            got=list(b.shape),
        )
    layer = Layer("conv", kernel=a.shape[2:])
    return a.reshaped((a.shape[0], math.prod(a.shape[1:]))), b.reshaped(b.shape[:2]), layer


def scale_of(alpha: float, rank: int, *, is_rooted: bool) -> float:
    """Return the factor of b @ a: α/r, or α/√r for rank-stabilised LoRA (arXiv 2312.03732).

    >>> scale_of(16, 4, is_rooted=False), scale_of(16, 4, is_rooted=True)
    (4.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if is_rooted else rank)


def alpha_of(rank: int, scale: float) -> int | float:
    """Return the α with α/r = scale, a whole number if a small one gives that scale.

    Raises:
        AdapterError: it is beyond float64.
    """
    alpha = scale * rank
    if not math.isfinite(alpha):
        raise AdapterError("alpha overflows", got=f"{scale:g} · {rank}")
    if abs(alpha) > _LARGEST_WHOLE:
        return alpha
    whole = round(alpha)
    return whole if whole / rank == scale else alpha


def stored_as(delta: ModuleChange, dtype: str | None) -> ModuleChange:
    """Return a change whose factors have a type, such as `bf16`; with None each keeps its own.

    Magnitudes, biases and the tensors of other kinds stay as they are.
    """
    part = delta.factors
    if dtype is None or part is None:
        return delta
    stored = DTYPES[dtype.upper()]
    return delta.with_direction(replace(part, a=rounded(part.a, stored), b=rounded(part.b, stored)))


def without_float64(delta: ModuleChange) -> ModuleChange:
    """Return a change whose factors and bias are float32 where they were float64."""
    part = delta.factors
    if part is None or all(tensor.dtype.code != "F64" for tensor in part.tensors()):
        return delta

    def narrow(tensor: TensorRef) -> TensorRef:
        return rounded(tensor, DTYPES["F32"]) if tensor.dtype.code == "F64" else tensor

    bias = None if part.bias is None else narrow(part.bias)
    return delta.with_direction(replace(part, a=narrow(part.a), b=narrow(part.b), bias=bias))


def kept_whole(adapter: Adapter) -> list[str]:
    """Return the modules whose change is a full difference, which few formats have."""
    return [name for name, delta in adapter.modules.items() if delta.kind == "full"]
