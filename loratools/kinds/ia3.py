"""IA³: outputs, or the inputs of feed-forward layers, are scaled (arXiv 2205.05638).

W' = l ∘ W per output, where the bias is scaled too, or per input. Source: peft 0.21.2, `ia3`.
"""

from __future__ import annotations

from loratools.kinds.declaration import Array, Change, Kind, Rows, Tensors, Weight
from loratools_formats.adapter import OtherDelta


def _change(delta: OtherDelta, weight: Weight) -> Change:
    tensors = Tensors(delta)
    gain, on_input = tensors["gain"].reshape(-1) - 1.0, delta.settings["on_input"]
    out, in_ = weight.shape
    if on_input and len(gain) != in_ and in_ % len(gain) == 0:
        gain = gain.repeat(in_ // len(gain))  # one number per input channel of a convolution
    if len(gain) != (in_ if on_input else out):
        raise tensors.wrong_shape("gain", f"{in_ if on_input else out} numbers")

    def rows(start: int, stop: int) -> Array:
        factor = gain[None, :] if on_input else gain[start:stop, None]
        return factor * weight.rows(start, stop)

    return Rows(weight.shape, rows)


def _bias(delta: OtherDelta, _: Weight, bias: Array) -> Array:
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
    change=_change,
    bias=_bias,
)
