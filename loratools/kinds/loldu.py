"""LoLDU from its trained vector alone: the diagonal of the base's LU decomposition (2410.13618).

W = P·L·D·U, U of unit diagonal, and of its first r ranks only D is trained: ΔW = s · P·L ·
diag(z − d₀) · U with s = α/r. L, U and D come from the base weight with partial pivoting, as the
authors' code has them from LAPACK; d₀ is what was subtracted from the base when training began: D,
or its mean where `init_method` was constant. With uniform or normal it was random, and the file
does not tell the change. Source: `minloldu/loldu.py` of SKDDJ/LoLDU 4fe87a0.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_ROWS = 1 << 10
_ROUNDING = 1e-6  # relative; LAPACK pivots in float32


def _leading_ldu(weight: Weight, rank: int, label: str) -> tuple[Array, Array, Array]:
    """Return P·L (out, r), D (r,) and the rows of U (r, in) of the first ranks.

    Only the columns and rows that they depend on are computed.

    Raises:
        UnsupportedError: rounding would decide which row a pivot is, or one is zero.
    """
    out, in_ = weight.shape
    starts = range(0, out, _ROWS)
    columns = np.concatenate([weight.rows(i, min(i + _ROWS, out))[:, :rank] for i in starts])
    lower, upper, pivots = np.zeros((out, rank)), np.zeros((rank, in_)), np.zeros(rank)
    left = np.ones(out, bool)
    for step in range(rank):
        column = columns[:, step] - lower[:, :step] @ upper[:step, step]
        sizes = np.where(left, np.abs(column), -1.0)
        pivot = int(sizes.argmax())
        rivals = np.count_nonzero(sizes >= sizes[pivot] * (1.0 - _ROUNDING))
        if sizes[pivot] == 0.0 or (step > 0 and rivals > 1):
            raise UnsupportedError(
                "the base's LU decomposition is not determined beyond rounding",
                tensor=label,
                got=f"{rivals} rows for pivot {step}",
            )
        lower[left, step] = column[left] / column[pivot]
        left[pivot] = False
        upper[step] = weight.rows(pivot, pivot + 1)[0] - lower[pivot, :step] @ upper[:step]
        pivots[step] = column[pivot]
    return lower, pivots, upper / pivots[:, None]


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    z = tensors["z"].reshape(-1)
    rank = len(z)
    if rank > min(weight.shape):
        raise AdapterError(
            "more ranks than the weight has", tensor=delta.parts["z"].key, got=rank,
            expected=f"at most {min(weight.shape)}",
        )  # fmt: skip
    lower, pivots, upper = _leading_ldu(weight, rank, delta.parts["z"].key)
    start = pivots.mean() if delta.settings["init_method"] == "constant" else pivots
    scale = delta.settings["alpha"] / rank
    return Product(scale * lower, (z - start)[:, None] * upper)


KIND = Kind(
    name="loldu",
    title="LoLDU, its trained vector",
    source="arXiv 2410.13618",
    parts=("z",),
    needs="weight",
    form=_form,
)
