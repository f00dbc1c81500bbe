"""Checkpoints and adapters of names and shapes alone; reading a tensor of them fails the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.base.placement import Placements, place
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.change import Layer, LowRank, ModuleChange
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.tensors import TensorRef

Shape = tuple[int, ...]


def header(key: str, shape: Shape) -> TensorRef:
    def read() -> bytes:
        raise AssertionError(f"{key} was read")

    return TensorRef(key, DTYPES["F32"], shape, read)


def checkpoint(tensors: Mapping[str, Shape], **config: Any) -> Checkpoint:
    refs = {key: header(key, shape) for key, shape in tensors.items()}
    return Checkpoint(Path("base"), refs, config, ())


def linear(out: int, in_: int, *, bias: bool = False, **layer: Any) -> ModuleChange:
    """Return a delta of rank 2, of a linear layer unless `layer` says otherwise."""
    factors = LowRank(
        header("a", (2, in_)),
        header("b", (out, 2)),
        1.5,
        Layer(**{"kind": "linear", **layer}),
        header("bias", (out,)) if bias else None,
    )
    return ModuleChange(factors)


def dora(out: int, in_: int) -> ModuleChange:
    return replace(linear(out, in_), magnitude=header("magnitude", (out,)))


def experts(
    count: int, out: int, in_: int, *names: str, square: bool | None = None
) -> ModuleChange:
    factors = LowRank(
        header("a", (count, 2, in_)),
        header("b", (count, out, 2)),
        1.5,
        Layer("experts", parameters=names, transposed_if_square=square),
    )
    return ModuleChange(factors)


def adapter(modules: Mapping[str, ModuleChange], **replaced: Any) -> Adapter:
    return Adapter("peft", Path("adapter"), modules, replacements=replaced)


def replacing(kind: Any, target: str, shape: Shape, rows: tuple[int, ...] = ()) -> Replacement:
    return Replacement(kind, target, header(target, shape), rows)


def placed(modules: Mapping[str, ModuleChange], base: Checkpoint) -> Placements:
    return place(adapter(modules), base)


def keys(modules: Mapping[str, ModuleChange], base: Checkpoint) -> list[str]:
    return [placement.key for placement in placed(modules, base).deltas]
