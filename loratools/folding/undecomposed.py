"""Deltas that are no product of thin factors: decomposed one at a time, without making factors.

A Kronecker product's singular values are the products of those of its sides: its best factors of a
rank take no time, while all of its factors are as large as the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Decomposed
from loratools.base.shape_only import ShapeOnly
from loratools.folding.decomposed import Streaming, decomposed, rows_of
from loratools.folding.module import checked_form, known_shape
from loratools.folding.without_base import folds_alone
from loratools.kinds.declaration import DeltaForm, Kronecker
from loratools.lowrank.matrices import matrices
from loratools.lowrank.planned import PlannedFactors
from loratools_formats.core.change import KindDelta, ModuleChange


def is_apart(delta: ModuleChange) -> bool:
    """Return whether a change is of a kind that can be decomposed here, without the base."""
    return folds_alone(delta) and not delta.is_dora and delta.layer.kind != "experts"


@dataclass(frozen=True)
class Apart:
    """A module of another kind, whose delta is decomposed directly.

    Attributes:
        name: module path.
        delta: its ΔW.
    """

    name: str
    delta: KindDelta

    def _form(self) -> DeltaForm:
        return checked_form(self.name, self.delta, ShapeOnly(known_shape(self.delta)))

    def planned(self) -> PlannedFactors:
        """Return the plan of factors of the highest rank that it can have."""
        form = self._form()
        shape = rows_of(form).shape
        rank = min(shape)
        if isinstance(form, Kronecker):
            rank = min(form.left.shape) * min(form.right.shape)
        delta = self.delta
        return PlannedFactors.new(self.name, delta.layer, shape, rank=rank, bias=delta.bias)

    def matrices(self, device: Device) -> list[Decomposed]:
        """Return its matrix, taken apart."""
        form = self._form()
        everything = Streaming(min(rows_of(form).shape), seed=0)
        return [decomposed(form, device, everything, self.name)]


def matrices_of(change: ModuleChange, apart: Apart | None, device: Device) -> Sequence[Decomposed]:
    """Return every matrix of a module, whether it has factors or is taken apart."""
    return matrices(change.require_factors(), device) if apart is None else apart.matrices(device)
