"""A full difference: ΔW = scale · diff, of any rank (LyCORIS `diff`, extracted checkpoints)."""

from __future__ import annotations

from loratools.kinds.declaration import Change, Kind, Rows, Tensors, Weight
from loratools_formats.adapter import OtherDelta


def _change(delta: OtherDelta, _: Weight) -> Change:
    diff = Tensors(delta)["diff"]
    matrix = diff.reshape(len(diff), -1)
    scale = delta.settings["scale"]
    return Rows((matrix.shape[0], matrix.shape[1]), lambda start, stop: scale * matrix[start:stop])


KIND = Kind(
    name="full",
    title="full difference",
    source="LyCORIS",
    parts=("diff",),
    change=_change,
    low_rank=False,
)
