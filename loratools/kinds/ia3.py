"""IA³: outputs, or the inputs of feed-forward layers, are scaled (arXiv 2205.05638).

W' = l ∘ W per output, where the bias is scaled too, or per input. Source: peft 0.21.2, `ia3`.
"""

from __future__ import annotations

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array


def scaled(tensors: Tensors, factors: Array, weight: Weight, *, on_input: bool) -> Rows:
    """Return l ∘ W, a factor for each output or input.

    Args:
        tensors: of the module, for messages.
        factors: l.
        weight: W.
        on_input: whether they belong to inputs.

    Raises:
        AdapterError: there are more or fewer than that.
    """
    out, in_ = weight.shape
    if on_input and len(factors) != in_ and in_ % len(factors) == 0:
        factors = factors.repeat(in_ // len(factors))  # one for each input of a convolution
    if len(factors) != (in_ if on_input else out):
        raise tensors.wrong_shape("gain", f"{in_ if on_input else out} numbers")

    def rows(start: int, stop: int) -> Array:
        factor = factors[None, :] if on_input else factors[start:stop, None]
        return factor * weight.rows(start, stop)

    return Rows(weight.shape, rows)


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    change = tensors["gain"].reshape(-1) - 1.0
    return scaled(tensors, change, weight, on_input=delta.settings["on_input"])


def _bias(delta: KindDelta, _: Weight, bias: Array) -> Array:
    if delta.settings["on_input"]:
        return 0.0 * bias
    added: Array = (Tensors(delta)["gain"].reshape(-1) - 1.0) * bias
    return added


KIND = Kind(
    name="ia3",
    title="IA³",
    source="arXiv 2205.05638",
    parts=("gain",),
    needs="weight",
    low_rank=False,
    form=_form,
    bias=_bias,
)
