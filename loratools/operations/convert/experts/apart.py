"""Stacks of each projection, whose factors are all of one rank and scale in a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from loratools.operations.convert.experts.groups import Group
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.dtypes import dtype_of_multiples, encode, is_power_of_two
from loratools_formats.core.tensors import TensorRef, have_same_bits
from loratools_formats.disk.errors import UnsupportedError

_OUTER = {"gate_up_proj": "a", "gate_proj": "a", "up_proj": "a", "down_proj": "b"}
"""The factor that a shared-outer file holds once: the one on the side of the model's width."""


def of_one_rank(changes: Mapping[str, ModuleChange]) -> dict[str, ModuleChange]:
    """Return changes of the largest rank among them and one scale.

    Smaller ranks get zeros. Another scale is folded into B and its bias: exactly if the ratio is a
    power of two, else with one rounding, and they are float32 then if they were narrower.
    """
    parts = {name: change.require_factors() for name, change in changes.items()}
    if not parts:
        return {}
    rank = max(part.rank for part in parts.values())
    scale = next(iter(parts.values())).scale
    return {n: c.with_direction(_padded(parts[n], rank, scale)) for n, c in changes.items()}


def rounds(parts: Iterable[LowRank]) -> bool:
    """Return whether bringing factors to one scale rounds."""
    scales = {part.scale for part in parts}
    first = next(iter(scales), 1.0)
    return not all(is_power_of_two(scale / first) for scale in scales)


def _padded(part: LowRank, rank: int, scale: float) -> LowRank:
    b, bias = part.b, part.bias
    if part.scale != scale:
        b = _times(b, part.scale / scale)
        bias = None if bias is None else _times(bias, part.scale / scale)
    more = rank - part.rank
    a = part.a
    if more:
        *stack, _, in_ = part.a.shape
        a = _with_zeros(part.a, (*stack, rank, in_))
        b = _with_zeros(b, (*b.shape[:-1], rank))
    if a is part.a and b is part.b and part.scale == scale:
        return part
    return replace(part, a=a, b=b, bias=bias, scale=scale, alpha=None, alpha_tensor=None)


def _times(tensor: TensorRef, factor: float) -> TensorRef:
    dtype = dtype_of_multiples(tensor.dtype, [factor])

    def read() -> bytes:
        import numpy as np

        return encode(tensor.load(np.float64) * factor, dtype).tobytes()

    return TensorRef(tensor.key, dtype, tensor.shape, read)


def _with_zeros(tensor: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    def read() -> bytes:
        import numpy as np

        values = tensor.load()
        made = np.zeros(shape, values.dtype)
        made[tuple(map(slice, values.shape))] = values
        return made.tobytes()

    return TensorRef(tensor.key, tensor.dtype, shape, read)


def shared_outer(group: Group) -> None:
    """Check that the outer factors of a layer's experts are one tensor each, bit for bit.

    Raises:
        UnsupportedError: they are not.
    """
    sides: dict[str, list[TensorRef]] = {}
    for leaf, change in group.stacks.items():
        part = change.require_factors()
        side = part.a if _OUTER.get(leaf) == "a" else part.b
        sides[_OUTER[leaf]] = [side.matrix(expert) for expert in range(part.experts)]
    for leaf, experts in group.single.items():
        parts = [change.require_factors() for change in experts.values()]
        sides.setdefault(_OUTER[leaf], []).extend(
            part.a if _OUTER[leaf] == "a" else part.b for part in parts
        )
    for outer, tensors in sides.items():
        for tensor in tensors[1:]:
            if not have_same_bits(tensors[0], tensor):
                what = "A of gate and up" if outer == "a" else "B of down"
                raise UnsupportedError(
                    f"experts do not share {what}, so that a shared-outer file cannot hold them",
                    tensor=group.owner,
                    got=f"{tensors[0].key} and {tensor.key}",
                    expected="factors that agree in every bit",
                    hint="Write them in full: `experts=3d` or `experts=each` is exact",
                )


def whole(group: Group, experts: int) -> None:
    """Check that every projection has all experts.

    Raises:
        UnsupportedError: one is missing.
    """
    for leaf, changes in group.single.items():
        missing = set(range(experts)) - set(changes)
        if missing:
            raise UnsupportedError(
                "an expert is missing, and a stack holds all",
                tensor=f"{group.owner}.{min(missing)}.{leaf}",
                hint="Write them one by one: `experts=each` is exact",
            )
