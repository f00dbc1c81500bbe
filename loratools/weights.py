"""Weights of a base model as matrices (out, in), read a block of rows at a time.

Rows of a weight that lies in its file the same way are read where they are; one that is stored the
other way round is held whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools_formats.adapter import Layer, LowRank, OtherDelta
from loratools_formats.checkpoint import Checkpoint
from loratools_formats.dtypes import converted, decode
from loratools_formats.errors import AdapterError, UnsupportedError
from loratools_formats.orientation import is_transposed
from loratools_formats.tensors import TensorRef

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Place:
    """Where in the base a module's weight is.

    Attributes:
        stored: the tensor.
        crossed: whether it is stored as (in, out).
        layer: what the module is, as the tensor's shape shows.
        bias: the layer's bias, None if it has none.
    """

    stored: TensorRef
    crossed: bool
    layer: Layer
    bias: TensorRef | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.stored.shape[0], math.prod(self.stored.shape[1:])
        return (columns, rows) if self.crossed else (rows, columns)

    def weight(self) -> BaseWeight:
        """Return its weight."""
        return BaseWeight(self.stored, crossed=self.crossed)


def find_place(base: Checkpoint, name: str, delta: LowRank | OtherDelta) -> Place:
    """Return where the weight of a module is.

    Raises:
        AdapterError: no tensor of the base fits, or several do.
        UnsupportedError: it is not known which way round the weight is stored.
    """
    stored = base.weight(name)
    crossed = is_transposed(name, delta, stored.shape)
    layer = delta.layer
    if len(stored.shape) > 2 and layer.kind != "experts" and not layer.parameters:
        layer = Layer("conv", kernel=stored.shape[2:])
    return Place(
        stored, crossed, layer, base.tensors.get(f"{stored.key.removesuffix('weight')}bias")
    )


class BaseWeight:
    """One weight of the base.

    Args:
        stored: the tensor: (out, in), (in, out), or (out, in, *kernel).
        crossed: whether it is stored as (in, out).
    """

    def __init__(self, stored: TensorRef, *, crossed: bool) -> None:
        self._stored = stored
        self._wide = np.float64
        rows, columns = stored.shape[0], math.prod(stored.shape[1:])
        self.shape = (columns, rows) if crossed else (rows, columns)
        self._whole: Array | None = None
        if crossed or stored.file is None:
            narrow = np.float64 if stored.dtype.code == "F64" else np.float32
            matrix = stored.load(narrow).reshape(rows, columns)
            self._whole = matrix.T if crossed else matrix

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) in float64.

        Raises:
            AdapterError: NaN or infinite values.
        """
        rows = self._read(start, stop)
        if not np.isfinite(rows).all():
            raise AdapterError("base weight holds NaN or infinite values", tensor=self._stored.key)
        return rows

    def _read(self, start: int, stop: int) -> Array:
        if self._whole is not None:
            return self._whole[start:stop].astype(np.float64)
        stored = self._stored
        assert stored.file is not None
        width = stored.nbytes // self.shape[0]
        data = stored.file.read_at(stored.offset + start * width, (stop - start) * width)
        values = decode(data, stored.dtype, (stop - start, self.shape[1]))
        return converted(values, np.float64)


class ShapeOnly:
    """A weight of which only the shape is known."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def rows(self, start: int, stop: int) -> Array:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "the weight change depends on the base weight",
            got=f"rows {start} to {stop} asked for",
            hint="Pass the base model with --base",
        )
