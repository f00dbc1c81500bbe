"""DoRA and its base weight: the change it makes, and magnitudes that make no further change.

W' = m/‖W + ΔW‖ ⊙ (W + ΔW), norms per output of the matrix (out, in): per row of a linear layer,
per filter of a convolution, per column of an embedding. Source: arXiv 2402.09353 and peft 0.21.2,
`DoraLinearVariant`. LyCORIS before version 3 has them per input: `apply_weight_decompose` with
`wd_on_out` false.
"""

from __future__ import annotations

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.kinds.declaration import Rows, Weight
from loratools.work.parallel import in_parts
from loratools_formats.core.change import Axis
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError


class Rescaling:
    """A DoRA's change g⊙(W + ΔW) − W, and how its energy is made up.

    Args:
        weight: W.
        delta: rows of ΔW.
        magnitude: (out,), or (in,) for a magnitude of each input.
        axis: whether norms and magnitudes belong to outputs or to inputs.
        kernel: columns that one input has: the elements of a convolution's kernel.

    Attributes:
        gains: (out, 1) or (1, in·kernel): g = m/‖W + ΔW‖.
        squared_norm: ‖g⊙(W + ΔW) − W‖²_F.
        squared_low_rank: ‖g⊙ΔW‖²_F.
        squared_rescaling: ‖(g − 1)⊙W‖²_F.

    Raises:
        AdapterError: the magnitude does not fit.
    """

    def __init__(
        self,
        weight: Weight,
        delta: Rows,
        magnitude: Array,
        axis: Axis = "output",
        kernel: int = 1,
    ) -> None:
        expected = weight.shape[0] if axis == "output" else weight.shape[1] // kernel
        if magnitude.shape != (expected,):
            raise AdapterError(
                "the magnitude does not fit the weight",
                got=f"{magnitude.size} numbers",
                expected=f"{expected}, one per {axis}",
            )
        self.weight, self.delta = weight, delta
        if axis == "output":
            self.gains = np.empty((weight.shape[0], 1))
        else:
            self.gains = _gains(magnitude, _input_norms(weight, delta, kernel))
            self.gains = self.gains.repeat(kernel)[None, :]

        def measured(span: tuple[int, int]) -> tuple[float, float, float]:
            return self._measured(*span, magnitude if axis == "output" else None)

        parts = [*in_parts(measured, [*row_spans(weight.shape)])]
        self.squared_norm, self.squared_low_rank, self.squared_rescaling = (
            sum(each, 0.0) for each in zip(*parts, strict=True)
        )

    def _measured(
        self, start: int, stop: int, magnitude: Array | None
    ) -> tuple[float, float, float]:
        """Return the squared norms of rows of the change, of its low rank and of its rescaling.

        Magnitudes of outputs, if given, set the gains of these rows.
        """
        base, change = self.weight.rows(start, stop), self.delta.rows(start, stop)
        if magnitude is not None:
            norms = np.linalg.norm(base + change, axis=1)
            self.gains[start:stop, 0] = _gains(magnitude[start:stop], norms)
        gains = self._gains_of(start, stop)
        rescaling, low_rank = (gains - 1.0) * base, gains * change
        whole = rescaling + low_rank
        squares = [float(np.vdot(values, values)) for values in (whole, low_rank, rescaling)]
        return squares[0], squares[1], squares[2]

    def _gains_of(self, start: int, stop: int) -> Array:
        gains: Array = self.gains if len(self.gains) == 1 else self.gains[start:stop]
        return gains

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the change in float64."""
        base, change = self.weight.rows(start, stop), self.delta.rows(start, stop)
        gains = self._gains_of(start, stop)
        result: Array = (gains - 1.0) * base + gains * change
        return result


def _gains(magnitude: Array, norms: Array) -> Array:
    gains: Array = magnitude / np.where(norms > 0.0, norms, 1.0)
    return gains


def _input_norms(weight: Weight, delta: Rows, kernel: int) -> Array:
    """Return ‖W + ΔW‖ per input: (in,) float64."""
    squares = np.zeros(weight.shape[1])
    for start, stop in row_spans(weight.shape):
        whole = weight.rows(start, stop) + delta.rows(start, stop)
        squares += np.einsum("ij,ij->j", whole, whole)
    norms: Array = np.sqrt(squares.reshape(-1, kernel).sum(axis=1))
    return norms


def rescaling_of(magnitude: TensorRef, axis: Axis, weight: Weight, change: Rows) -> Rescaling:
    """Return the rescaling that a module's magnitudes apply to the rows of W + ΔW.

    Raises:
        AdapterError: they do not fit or are not finite.
    """
    values = finite_vector(magnitude, "magnitude")
    kernel = max(weight.shape[1] // values.size, 1) if axis == "input" else 1
    return Rescaling(weight, change, values, axis, kernel)


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
