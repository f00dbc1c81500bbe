"""FourierFT: a few entries of the two-dimensional Fourier spectrum (arXiv 2405.03003).

ΔW = scale · Re(IDFT2(F)), F zero except for `spectrum` at positions drawn from a seed: the first
ones of a random permutation of all entries, row by row. Source: `FourierFTLayer` in peft 0.21.2.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools.kinds.numbers.random_stream import TorchStream
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def drawn_entries(delta: KindDelta, weight: Weight) -> tuple[Array, Array, Array]:
    """Return `spectrum` and the rows and columns that a seed draws for it, each (n,).

    Raises:
        AdapterError: it is no vector, or has more numbers than the weight.
    """
    tensors = Tensors(delta)
    spectrum, (out, in_) = tensors["spectrum"], weight.shape
    if spectrum.ndim != 1 or len(spectrum) > out * in_:
        raise tensors.wrong_shape("spectrum", f"at most {out * in_} numbers")
    places = TorchStream(delta.settings["seed"]).first_of_permutation(out * in_, len(spectrum))
    return spectrum, *np.divmod(places, in_)


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    spectrum, row, column = drawn_entries(delta, weight)
    out, in_ = weight.shape
    scale = delta.settings["scale"] / (out * in_)
    # Re Σ s·exp(2πi(pr/out + qc/in)) over the entries (r, c): two real products, no dense F.
    by_column = 2.0 * np.pi * np.outer(column, np.arange(in_) / in_)
    cosines, sines = np.cos(by_column), np.sin(by_column)

    def rows(start: int, stop: int) -> Array:
        by_row = 2.0 * np.pi * np.outer(np.arange(start, stop) / out, row)
        even, odd = np.cos(by_row) * spectrum, np.sin(by_row) * spectrum
        result: Array = scale * (even @ cosines - odd @ sines)
        return result

    return Rows((out, in_), rows)


KIND = Kind(
    name="fourierft",
    title="FourierFT",
    source="arXiv 2405.03003",
    parts=("spectrum",),
    needs="shape",
    low_rank=False,
    form=_form,
)
