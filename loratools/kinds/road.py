"""RoAd: pairs of outputs are rotated and scaled (arXiv 2409.00119).

W' = R W, b' = R b, with R of 2×2 rotations between the two halves of each group of outputs. Source:
`_get_delta_weight` of road in peft 0.21.2, whose variants differ in how many angles and lengths a
group has.
"""

from __future__ import annotations

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight, rows_in_groups
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import UnsupportedError


def _columns(tensors: Tensors, variant: str, group: int) -> tuple[Array, Array]:
    """Return the diagonal of R, and what each output gets from its partner, without sign."""
    theta, alpha = tensors["theta"], tensors["alpha"]
    whole = {"road_1": group // 2, "road_4": 2 * group}.get(variant, group)
    if group % 2 or len(theta) % whole:
        raise tensors.wrong_shape("theta", f"a multiple of {whole}, for groups of {group}")
    if variant == "road_1":
        theta = theta.reshape(-1, group // 2).repeat(2, axis=0).reshape(-1)
        alpha = alpha.reshape(-1, group // 2).repeat(2, axis=0).reshape(-1)
    elif variant == "road_4":
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        diagonal = (alpha[:, 0] * np.cos(theta[:, 0])).reshape(-1)
        return diagonal, (alpha[:, 1] * np.sin(theta[:, 1])).reshape(-1)
    elif variant != "road_2":
        raise UnsupportedError("variant of RoAd is not known", got=variant)
    return alpha * np.cos(theta), alpha * np.sin(theta)


def _applied(columns: tuple[Array, Array], values: Array, group: int) -> Array:
    """Return R @ values − values for whole groups of rows."""
    diagonal, across = columns
    halves = values.reshape(-1, 2, group // 2, values.shape[1])
    partners = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(values.shape)
    result: Array = (diagonal - 1.0)[:, None] * values + across[:, None] * partners
    return result


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors, group = Tensors(delta), delta.settings["group"]
    diagonal, across = _columns(tensors, delta.settings["variant"], group)
    if len(diagonal) != weight.shape[0] or weight.shape[0] % group:
        raise tensors.wrong_shape("theta", f"groups of {group} for {weight.shape[0]} outputs")

    def of_groups(first: int, last: int) -> Array:
        span = slice(first * group, last * group)
        columns = diagonal[span], across[span]
        return _applied(columns, weight.rows(span.start, span.stop), group)

    return Rows(weight.shape, rows_in_groups(group, of_groups))


def _bias(delta: KindDelta, _: Weight, bias: Array) -> Array:
    group = delta.settings["group"]
    columns = _columns(Tensors(delta), delta.settings["variant"], group)
    return _applied(columns, bias[:, None], group)[:, 0]


KIND = Kind(
    name="road",
    title="RoAd",
    source="arXiv 2409.00119",
    parts=("theta", "alpha"),
    needs="weight",
    low_rank=False,
    form=_form,
    bias=_bias,
)
