"""WaveFT: a few wavelet coefficients (arXiv 2505.12532).

The matrix of coefficients is zero except for `spectrum` at positions drawn from a seed, as in
FourierFT. Its quarters are the four bands of one level of a two-dimensional wavelet transform,
which is inverted and cropped; or, without transform, it is ΔW itself. Both steps are products with
one matrix per side. Source: `WaveFTLayer` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Weight
from loratools.kinds.fourierft import drawn_entries
from loratools.kinds.numbers.wavelets import scaling_filter
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def _synthesis(low: Array, side: int) -> tuple[Array, int]:
    """Return the matrix (side, padded) of one inverse transform along an axis, and its pad.

    Columns are the coefficients of both bands, the approximation first, laid out over the padded
    side that PEFT makes room for; `pad` is how far the given coefficients lie from its start.
    """
    length = len(low)
    padded = side + length - 2
    padded += padded % 2
    high = low[::-1] * (-1.0) ** np.arange(length)
    half = padded // 2
    full = np.zeros((2 * (half - 1) + length, padded))
    for i in range(half):
        full[2 * i : 2 * i + length, i] = low
        full[2 * i : 2 * i + length, half + i] = high
    edge = (2 * length - 3) // 2
    inner = full[edge : len(full) - edge] if edge else full
    start = (len(inner) - side) // 2
    return inner[start : start + side], (padded - side) // 2


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    spectrum, row, column = drawn_entries(delta, weight)
    out, in_ = weight.shape
    scale = delta.settings["scale"]
    wavelet = delta.settings["wavelet"]
    low = np.ones(1) if wavelet is None else scaling_filter(wavelet)
    on_rows, row_pad = _synthesis(low, out) if wavelet else (np.eye(out), 0)
    on_columns, column_pad = _synthesis(low, in_) if wavelet else (np.eye(in_), 0)
    row, column = row + row_pad, column + column_pad
    if wavelet is not None:
        # The quarter beside the approximation is its detail along rows, the one below that along
        # columns: which band a place means on one axis, its half on the other axis tells.
        (lower, in_lower), (right_half, in_right) = (
            np.divmod(place, matrix.shape[1] // 2)
            for place, matrix in ((row, on_rows), (column, on_columns))
        )
        row = in_lower + right_half * (on_rows.shape[1] // 2)
        column = in_right + lower * (on_columns.shape[1] // 2)
    left, right = on_rows[:, row], on_columns[:, column]
    return Rows((out, in_), lambda start, stop: scale * ((left[start:stop] * spectrum) @ right.T))


KIND = Kind(
    name="waveft",
    title="WaveFT",
    source="arXiv 2505.12532",
    parts=("spectrum",),
    needs="shape",
    low_rank=False,
    form=_form,
)
