"""Weights of a base model as matrices (out, in), read a block of rows at a time.

Rows of a weight that lies in its file the same way are read where they are; one that is stored the
other way round is held whole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from loratools_formats.dtypes import converted, decode
from loratools_formats.errors import AdapterError, UnsupportedError
from loratools_formats.tensors import TensorRef

Array = np.ndarray[Any, Any]


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
