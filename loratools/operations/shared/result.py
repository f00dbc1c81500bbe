"""What comes of bringing adapters into shared bases."""

from __future__ import annotations

from dataclasses import dataclass

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding


@dataclass(frozen=True)
class SharedAdapter:
    """One adapter in a set.

    Attributes:
        name: that it goes by in the set.
        group: whose bases it has.
        bytes_in: size of its own weight file.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of what is stored, rounded.
        alone_error: the same of its leading singular triplets, where all adapters squeezed one by
            one take as many bytes as the set, before rounding.
    """

    name: str
    group: int
    bytes_in: int
    relative_error: float
    alone_error: float


@dataclass(frozen=True)
class SharedModuleReport:
    """One module of one group.

    Attributes:
        name: module path.
        group: number of the group.
        rank_in: the rank at which bases would lose nothing.
        rank_out: rank of its bases.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of what is stored, over its members together.
        errors: of each member.
    """

    name: str
    group: int
    rank_in: int
    rank_out: int
    relative_error: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Shared:
    """A set of adapters, not yet written.

    Attributes:
        adapter: the set, to be given to `write_adapter`.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all adapters together, of what is stored.
        alone_error: the least that squeezing each alone to the same size would have.
        bytes_in: size of the adapters' weight files together.
        bytes_out: size of the set's file.
        groups: number of groups with bases of their own.
        adapters: one report each, in order.
        modules: one report for each module of each group, in path order.
        findings: what a user should know.
    """

    adapter: Adapter
    relative_error: float
    alone_error: float
    bytes_in: int
    bytes_out: int
    groups: int
    adapters: tuple[SharedAdapter, ...]
    modules: tuple[SharedModuleReport, ...]
    findings: tuple[Finding, ...]
