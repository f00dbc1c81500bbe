"""Experts one by one: two or three linear layers for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from loratools.operations.convert.experts.groups import Group, Order
from loratools.operations.convert.experts.recent import Recent
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import UnsupportedError


def each(
    group: Group, order: Order, recent: Recent, *, trimmed: bool = False
) -> dict[str, ModuleChange]:
    """Return a layer's experts one by one, bit for bit.

    A of a joined gate and up goes to both, and its B is cut.

    Args:
        group: the layer.
        order: how the model joins gate and up.
        recent: keeps what was read of stacks, which are read once for each expert.
        trimmed: whether ranks go that are zero in all experts of a projection, as they are where
            gate and up were joined with factors of their own.
    """
    made: dict[str, ModuleChange] = {}
    for leaf, change in group.stacks.items():
        kept: dict[str, list[int] | None] = {}
        for expert in range(change.require_factors().experts):
            part = change.require_factors()
            a, b = recent.of(part.a), recent.of(part.b)
            if part.layer.kind == "experts":
                a, b = a.matrix(expert), b.matrix(expert)
            single = replace(part, a=a, b=b, layer=Layer("linear"))
            for name, rows in _cuts(leaf, b, order, group.owner):
                cut = replace(single, b=b if rows is None else b.rows(rows))
                if trimmed and rows is not None:
                    if name not in kept:
                        kept[name] = _used(part.b, rows)
                    cut = _trimmed(cut, kept[name])
                made[f"{group.owner}.{expert}.{name}"] = ModuleChange(cut)
    for leaf, experts in group.single.items():
        for expert, change in experts.items():
            part = change.require_factors()
            for name, rows in _cuts(leaf, part.b, "halves", group.owner):
                cut = replace(part, b=part.b if rows is None else part.b.rows(rows))
                made[f"{group.owner}.{expert}.{name}"] = change.with_direction(cut)
    return made


def _used(b: TensorRef, rows: list[int]) -> list[int] | None:
    """Return which ranks act on some rows of any expert; None if all do."""
    acts = (b.load()[..., rows, :] != 0).any(axis=tuple(range(len(b.shape) - 1)))
    return None if acts.all() else [int(rank) for rank in acts.nonzero()[0]] or [0]


def _trimmed(part: LowRank, ranks: list[int] | None) -> LowRank:
    if ranks is None:
        return part

    def columns() -> bytes:
        return np.ascontiguousarray(part.b.load()[:, ranks]).tobytes()

    b = TensorRef(part.b.key, part.b.dtype, (part.b.shape[0], len(ranks)), columns)
    return replace(part, a=part.a.rows(ranks), b=b, alpha=None)


def _cuts(
    leaf: str, b: TensorRef, order: Order, owner: str
) -> Iterator[tuple[str, list[int] | None]]:
    """Yield the projections that a parameter holds, and which of its outputs; None for all."""
    if leaf != "gate_up_proj":
        if leaf not in ("gate_proj", "up_proj", "down_proj"):
            raise UnsupportedError(
                "experts of this model are not stored one by one",
                tensor=f"{owner}.{leaf}",
                hint="Keep them stacked, which is exact: `experts=stacked`",
            )
        yield leaf, None
        return
    out = b.shape[0]
    if out % 2:
        raise UnsupportedError(
            "a gate and up in one tensor have an even number of outputs", tensor=b.key, got=out
        )
    half = out // 2
    if order == "alternating":
        yield "gate_proj", list(range(0, out, 2))
        yield "up_proj", list(range(1, out, 2))
    else:
        yield "gate_proj", list(range(half))
        yield "up_proj", list(range(half, out))
