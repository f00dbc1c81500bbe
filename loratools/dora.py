"""DoRA and its base weight: the change it makes, and magnitudes that leave a change as it is.

W' = m/‖W + ΔW‖ ⊙ (W + ΔW), norms per output of the matrix (out, in): per row of a linear layer,
per filter of a convolution, per column of an embedding. Source: arXiv 2402.09353 and peft 0.21.2,
`DoraLinearVariant`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loratools.kinds.declaration import Rows, Weight
from loratools.stream import row_spans
from loratools_formats.errors import AdapterError
from loratools_formats.tensors import TensorRef

Array = np.ndarray[Any, Any]


class Rescaling:
    """A DoRA's change g⊙(W + ΔW) − W, and how its energy is made up.

    Args:
        weight: W.
        delta: rows of ΔW.
        magnitude: (out,).

    Attributes:
        gains: (out,): g = m/‖W + ΔW‖.
        squared_norm: ‖g⊙(W + ΔW) − W‖²_F.
        squared_low_rank: ‖g⊙ΔW‖²_F.
        squared_rescaling: ‖diag(g − 1)W‖²_F.

    Raises:
        AdapterError: the magnitude does not fit.
    """

    def __init__(self, weight: Weight, delta: Rows, magnitude: Array) -> None:
        if magnitude.shape != weight.shape[:1]:
            raise AdapterError(
                "the magnitude does not fit the weight",
                got=f"{magnitude.size} numbers",
                expected=f"{weight.shape[0]}, one per output",
            )
        self.weight, self.delta = weight, delta
        self.gains = np.empty(weight.shape[0])
        self.squared_norm = self.squared_low_rank = self.squared_rescaling = 0.0
        for start, stop in row_spans(weight.shape):
            base, change = weight.rows(start, stop), delta.rows(start, stop)
            norms = np.linalg.norm(base + change, axis=1)
            gains = magnitude[start:stop] / np.where(norms > 0.0, norms, 1.0)
            self.gains[start:stop] = gains
            rescaling, low_rank = (gains - 1.0)[:, None] * base, gains[:, None] * change
            self.squared_rescaling += float(np.vdot(rescaling, rescaling))
            self.squared_low_rank += float(np.vdot(low_rank, low_rank))
            whole = rescaling + low_rank
            self.squared_norm += float(np.vdot(whole, whole))

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the change in float64."""
        base, change = self.weight.rows(start, stop), self.delta.rows(start, stop)
        gains = self.gains[start:stop, None]
        result: Array = (gains - 1.0) * base + gains * change
        return result


def rescaled_rows(rescaling: Rescaling) -> Rows:
    """Return a DoRA's change as rows on demand."""
    return Rows(rescaling.weight.shape, rescaling.rows)


def finite_vector(tensor: TensorRef, what: str) -> Array:
    """Return a tensor of one number per output, flat, in float64.

    Args:
        tensor: the numbers.
        what: what they are, for messages.

    Raises:
        AdapterError: NaN or infinite values.
    """
    values = tensor.load(np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise AdapterError(f"{what} holds NaN or infinite values", tensor=tensor.key)
    return values


def output_norms(weight: Weight, delta: Rows) -> Array:
    """Return ‖W + ΔW‖ per output: (out,) float64."""
    norms = np.empty(weight.shape[0])
    for start, stop in row_spans(weight.shape):
        norms[start:stop] = np.linalg.norm(
            weight.rows(start, stop) + delta.rows(start, stop), axis=1
        )
    return norms
