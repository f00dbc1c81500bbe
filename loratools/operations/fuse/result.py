"""What fusing did, and what it would do: the frozen results of `operation` and of `gguf`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loratools.operations.fuse.loss import lost_to_rounding, surviving
from loratools.operations.fuse.plan import TensorPlan
from loratools.operations.fuse.tensor import TensorReport
from loratools_formats.core.findings import Finding


@dataclass(frozen=True)
class FuseResult:
    """What fusing did.

    Attributes:
        tensors: every touched tensor, in the base's order.
        copied: number of tensors copied byte for byte.
        converted: number of tensors that no adapter changes, stored in another type than before.
        nbytes: size of the weight files.
        shards: their names.
        findings: what a user should know.
        left_out: files of the base that were not carried over.
    """

    tensors: tuple[TensorReport, ...]
    copied: int
    converted: int
    nbytes: int
    shards: tuple[str, ...]
    findings: tuple[Finding, ...]
    left_out: tuple[str, ...]

    @property
    def relative_change(self) -> float | None:
        """‖ΔW‖/‖W‖ over all touched tensors; None if W is zero there, 0 if no tensor is touched."""
        base = math.sqrt(sum(t.base_norm**2 for t in self.tensors))
        delta = math.sqrt(sum(t.delta_norm**2 for t in self.tensors))
        if not base:
            return None if delta else 0.0
        return delta / base

    @property
    def surviving(self) -> float | None:
        """Share of ΔW that survives, over all weights quantised again; None if there are none."""
        return surviving(self.tensors)

    @property
    def quantising_error(self) -> float | None:
        """‖W' − (W + ΔW)‖/‖ΔW‖ over the weights that are quantised again; None of none."""
        found = [t for t in self.tensors if t.surviving is not None]
        return lost_to_rounding(found) if found else None

    @property
    def base_rounding(self) -> float | None:
        """‖W − dq(q(W))‖/‖ΔW‖ over the weights that were rounded to four bits first."""
        found = [t for t in self.tensors if t.base_rounding is not None]
        delta = math.sqrt(sum(t.delta_norm**2 for t in found))
        moved = math.sqrt(sum((t.base_rounding or 0.0) ** 2 for t in found))
        return moved / delta if delta else None

    @property
    def lost(self) -> float:
        """Share of ΔW lost to rounding over all touched tensors."""
        return lost_to_rounding(self.tensors)


@dataclass(frozen=True)
class FusePreview:
    """What fusing would write.

    Attributes:
        touched: tensors that adapters change.
        dtypes: the type each would be stored in.
        total: number of tensors in all.
        nbytes: size of the weight files.
        files: their number.
        findings: what a user should know.
    """

    touched: tuple[TensorPlan, ...]
    dtypes: Mapping[str, str]
    total: int
    nbytes: int
    files: int
    findings: tuple[Finding, ...]
