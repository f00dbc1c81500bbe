"""Find the stored tensors that make up a quantised weight, and refuse those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping

from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError


def sibling(
    tensors: Mapping[str, TensorRef],
    key: str,
    codes: tuple[str, ...],
    shape: tuple[int, ...] | None = None,
    hint: str | None = None,
) -> TensorRef:
    """Return a tensor that a weight needs.

    Args:
        tensors: those of the checkpoint.
        key: name of the tensor.
        codes: types that it may have.
        shape: what it must have; None for any.
        hint: what to know where it has another type or shape.

    Raises:
        AdapterError: it is missing, or has another type or shape.
    """
    if key not in tensors:
        raise missing_part(key)
    found = tensors[key]
    if found.dtype.code not in codes:
        raise AdapterError(
            "a tensor of a quantised weight has the wrong type",
            tensor=key,
            got=found.dtype.code,
            expected=" or ".join(codes),
            hint=hint,
        )
    if shape is not None and found.shape != shape:
        raise wrong_shape(found, list(shape), hint)
    return found


def missing_part(key: str) -> AdapterError:
    """Return the error that a tensor of a weight is not there."""
    return AdapterError("a tensor of a quantised weight is missing", tensor=key)


def wrong_shape(tensor: TensorRef, expected: object, hint: str | None = None) -> AdapterError:
    """Return the error that a tensor of a weight does not fit the others."""
    return AdapterError(
        "a tensor of a quantised weight has the wrong shape",
        tensor=tensor.key,
        got=list(tensor.shape),
        expected=expected,
        hint=hint,
    )
