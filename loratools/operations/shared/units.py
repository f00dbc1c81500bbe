"""Adapters that are to be shared, seen as units: one module of one group each.

A unit's factors are read when it is asked for its matrices, and by nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.joint import Joint, Triplets
from loratools.algebra.ranks import RankRule, Spectrum
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.align import AlignedModule
from loratools.operations.shared.bases import joints_of
from loratools.operations.shared.members import Entrant, triplets_of
from loratools.operations.shared.options import ShareOptions
from loratools_formats.contract.shared_set import Part
from loratools_formats.core.dtypes import DTYPES, Array, DType, common_dtype
from loratools_formats.core.tensors import unmade


@dataclass(frozen=True)
class Unit:
    """One module of one group.

    Attributes:
        name: unique among units.
        module: of all adapters.
        group: its number.
        members: those of the group that have the module.
    """

    name: str
    module: AlignedModule
    group: int
    members: tuple[int, ...]

    @property
    def is_stack(self) -> bool:
        """Whether the weight is a stack of matrices."""
        return self.module.first.layer.kind == "experts"


class Fleet:
    """The adapters, their modules, and how they are to be shared.

    Args:
        entrants: the adapters.
        modules: of all adapters.
        rule: how the ranks of bases are chosen.
        compute: threads, and the type to store.
        options: how to share.
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        modules: Sequence[AlignedModule],
        rule: RankRule,
        compute: ComputeOptions,
        options: ShareOptions,
    ) -> None:
        self.entrants = entrants
        self.modules = {module.name: module for module in modules}
        self.columns = {name: column for column, name in enumerate(self.modules)}
        self.options = options
        self.dtype = _dtype(modules, compute)
        self._needs_energies = bool(rule.energy or rule.sv_fro or rule.budget)

    def loaded(self, name: str) -> list[list[Triplets] | None]:
        """Return the matrices that each adapter has in a module; None where it lacks it."""
        pairs = zip(self.modules[name].deltas, self.entrants, strict=True)
        return [
            None
            if change is None
            else triplets_of(name, change.require_factors(), one.source.source)
            for change, one in pairs
        ]

    def weights(self, squares: Array, norms: Array) -> Array:
        """Return what the squared error of each adapter in each module counts: (N, M)."""
        if self.options.weigh == "norm":
            return np.full_like(squares, 1.0 / norms.sum())
        whole = squares if self.options.weigh == "module" else norms[:, None]
        whole = np.broadcast_to(whole, squares.shape)
        return np.divide(1.0, whole, out=np.zeros(squares.shape), where=whole > 0.0)

    def units(
        self, groups: Sequence[Sequence[int]], names: Sequence[str] | None = None
    ) -> list[Unit]:
        """Return the units of groups, of the modules of these names or of all."""
        units = []
        for module in (self.modules[name] for name in names or self.modules):
            for group, members in enumerate(groups):
                having = tuple(i for i in sorted(members) if module.deltas[i] is not None)
                if having:
                    name = f"{module.name} of group {group}"
                    units.append(Unit(name, module, group, having))
        return units

    def joints(self, unit: Unit, weights: Array) -> tuple[list[list[Triplets]], list[Joint], Array]:
        """Return the matrices of a unit's members, their joint cores, and their weights."""
        column = self.columns[unit.module.name]
        changes = [unit.module.deltas[i] for i in unit.members]
        loaded = [
            triplets_of(unit.module.name, c.require_factors(), self.entrants[i].source.source)
            for i, c in zip(unit.members, changes, strict=True)
            if c is not None
        ]
        own: Array = weights[list(unit.members), column]
        return loaded, joints_of(loaded, [float(w) for w in own]), own

    def spectrum(self, unit: Unit, joints: Sequence[Joint], *, energies: bool = False) -> Spectrum:
        """Return what each rank of a unit's bases keeps, as far as it is asked, and its cost."""
        most = max(1, *(joint.rank for joint in joints))
        if self.options.cores == "diagonal":
            most = max(1, *(min(joint.sizes) for joint in joints))
        rows = np.zeros((len(joints), most))
        if energies or self._needs_energies:
            for row, joint in zip(rows, joints, strict=True):
                kept = joint.energies()[:most]
                row[: len(kept)] = np.sqrt(kept)
        out, in_ = unit.module.first.shape
        itemsize = self.dtype.bits // 8 * len(joints)
        line, square = (out + in_) * itemsize, len(unit.members) * itemsize
        if self.options.cores == "diagonal":
            line, square = line + square, 0
        return Spectrum(
            unit.name,
            (out, in_),
            rows,
            most,
            line,
            bytes_per_square=square,
            module=unit.module.name,
        )

    def planned(self, unit: Unit, rank: int) -> Part:
        """Return what a unit will store with bases of a rank, without values."""
        out, in_ = unit.module.first.shape
        stack = (unit.module.first.experts,) if unit.is_stack else ()
        core = (rank,) if self.options.cores == "diagonal" else (rank, rank)
        shapes = ((*stack, out, rank), (*stack, rank, in_), (len(unit.members), *stack, *core))
        u, v, cores = (unmade(unit.name, self.dtype, shape) for shape in shapes)
        return Part(u, v, cores, unit.members)

    @property
    def bytes_in(self) -> int:
        """Size of the adapters' own weight files."""
        return sum(one.source.weights_nbytes for one in self.entrants)


def _dtype(modules: Sequence[AlignedModule], compute: ComputeOptions) -> DType:
    if compute.dtype is not None:
        return DTYPES[compute.dtype.upper()]
    return common_dtype(list(_dtypes(modules)))


def _dtypes(modules: Sequence[AlignedModule]) -> Iterator[DType]:
    for module in modules:
        for change in module.deltas:
            if change is not None:
                factors = change.require_factors()
                yield from (factors.a.dtype, factors.b.dtype)
