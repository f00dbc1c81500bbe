"""C3A: a grid of circulant blocks (arXiv 2407.19342).

Block (i, j) has kernel[i, j, (c − t) mod size] / in at its row t and column c. Source:
`get_circulant_fast` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _form(delta: KindDelta, _: Weight) -> DeltaForm:
    kernel = Tensors(delta)["kernel"]
    count_out, count_in, size = kernel.shape
    in_ = count_in * size
    columns = np.arange(size)

    def rows(start: int, stop: int) -> Array:
        block, inside = np.divmod(np.arange(start, stop), size)
        shifts = (columns[None, :] - inside[:, None]) % size
        chosen = np.take_along_axis(kernel[block], shifts[:, None, :], axis=2)
        result: Array = chosen.reshape(stop - start, in_) / in_
        return result

    return Rows((count_out * size, in_), rows)


KIND = Kind(
    name="c3a",
    title="C3A",
    source="arXiv 2407.19342",
    parts=("kernel",),
    low_rank=False,
    form=_form,
)
