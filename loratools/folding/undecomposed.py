"""Changes that are no product of thin factors, taken apart as they are when their turn comes.

A Kronecker product's singular values are the products of those of its sides: its best factors of a
rank take no time, while all of its factors are as large as the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Decomposed
from loratools.base.weights import ShapeOnly
from loratools.folding.decomposed import Streaming, decomposed, rows_of
from loratools.folding.module import checked_change, known_shape, planned_factors
from loratools.folding.without_base import folds_alone
from loratools.kinds.declaration import Change, Kronecker
from loratools.lowrank.matrices import matrices
from loratools_formats.core.adapter import KindDelta, LowRank, ModuleChange


def is_apart(delta: ModuleChange) -> bool:
    """Return whether a change is to be taken apart so: of another kind, told without the base."""
    return folds_alone(delta) and not delta.is_dora and delta.layer.kind != "experts"


@dataclass(frozen=True)
class Apart:
    """A module of another kind, which no factors are made of.

    Attributes:
        name: module path.
        delta: its change.
    """

    name: str
    delta: KindDelta

    def _change(self) -> Change:
        return checked_change(self.name, self.delta, ShapeOnly(known_shape(self.delta)))

    def planned(self) -> LowRank:
        """Return the factors of the highest rank that it can have, which are not made."""
        change = self._change()
        shape = rows_of(change).shape
        rank = min(shape)
        if isinstance(change, Kronecker):
            rank = min(change.left.shape) * min(change.right.shape)
        delta = self.delta
        return planned_factors(self.name, delta.layer, shape, rank=rank, bias=delta.bias)

    def parts(self, device: Device) -> list[Decomposed]:
        """Return its matrix, taken apart."""
        change = self._change()
        everything = Streaming(min(rows_of(change).shape), seed=0)
        return [decomposed(change, device, everything, self.name)]


def parts_of(delta: ModuleChange, apart: Apart | None, device: Device) -> Sequence[Decomposed]:
    """Return every matrix of a module's delta, or of what has no factors."""
    return matrices(delta.require_factors(), device) if apart is None else apart.parts(device)
