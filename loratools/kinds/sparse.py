"""Sparse changes: values at stored places (SHiRA, arXiv 2406.13175; SpIEL, arXiv 2401.16405).

ΔW is zero except for scale · `values`, added up at `indices`: pairs (2, n) of row and column, or
flat places (n,) counted row by row. Some, Supra among them, have plain factors beside it.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    values, places, (out, in_) = tensors["values"], tensors.integers("indices"), weight.shape
    row, column = places if places.ndim == 2 else np.divmod(places, in_)
    if row.shape != values.shape or (values.size and (row.max() >= out or column.max() >= in_)):
        raise tensors.wrong_shape("indices", f"a place in ({out}, {in_}) for each value")
    order = np.argsort(row, kind="stable")
    row, column, values = row[order], column[order], delta.settings["scale"] * values[order]
    factors = None
    if "a" in tensors:
        factors = delta.settings["factor_scale"] * tensors["b"], tensors["a"]

    def rows(start: int, stop: int) -> Array:
        first, last = np.searchsorted(row, [start, stop])
        block = np.zeros((stop - start, in_))
        np.add.at(block, (row[first:last] - start, column[first:last]), values[first:last])
        return block if factors is None else block + factors[0][start:stop] @ factors[1]

    return Rows((out, in_), rows)


KIND = Kind(
    name="sparse",
    title="sparse (SHiRA, SpIEL, SuperTuning)",
    source="arXiv 2406.13175",
    parts=("values", "indices"),
    optional=("a", "b"),
    needs="shape",
    low_rank=False,
    form=_form,
)
