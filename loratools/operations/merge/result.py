"""What merging gives: the adapter, and what was kept and lost of each module."""

from __future__ import annotations

from dataclasses import dataclass

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding


@dataclass(frozen=True)
class MergeModuleReport:
    """What happened to one module.

    Attributes:
        name: module path.
        ranks_in: rank of each adapter's factors, None where it does not have the module, or has no
            factors of it.
        rank_out: rank of the result; None if that is a full difference.
        energy: share of the merged change's ‖·‖²_F in the singular values kept.
        relative_error: of the stored, rounded factors against the merged change.
        absent: names of adapters that do not have the module and count as zero.
    """

    name: str
    ranks_in: tuple[int | None, ...]
    rank_out: int | None
    energy: float
    relative_error: float
    absent: tuple[str, ...]


@dataclass(frozen=True)
class MergeResult:
    """The merged adapter, not yet written.

    Attributes:
        adapter: to be given to `write_adapter`.
        modules: one report each, in path order.
        energy: share kept, over all modules together.
        relative_error: over all modules together.
        factor_residual: for `fedex`, how far the product of averaged factors would be from the
            averaged product; None for other methods or where factors cannot be averaged.
        left_out: paths of modules in which every adapter that has them has weight 0.
        findings: what bringing names together has to tell.
    """

    adapter: Adapter
    modules: tuple[MergeModuleReport, ...]
    energy: float
    relative_error: float
    factor_residual: float | None
    left_out: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
