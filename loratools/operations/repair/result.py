"""The options of `repair`, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loratools.base.decompositions import IntruderOptions
from loratools.work.declared import option
from loratools.work.typed import check_options
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True)
class RepairOptions:
    """What to repair.

    Attributes:
        intruders: how intruder dimensions are found.
        keep_intruders: leave intruder dimensions as they are.
        shrink: the factor by which singular values of intruder dimensions are multiplied.
        keep_every_rank: let the edits increase ranks, so that only rounding is lost.
        drop_dead: drop modules whose norm is below 1e-6 of the median.
        rebalance: balance factors whose norms differ by more than 1000 times.

    Raises:
        OptionError: nothing to do, or λ out of range.
    """

    intruders: IntruderOptions = IntruderOptions()
    keep_intruders: bool = option(False, heading="Method")
    shrink: float = option(0.75, heading="Method", name="lambda_")
    keep_every_rank: bool = option(False, heading="Rank")
    drop_dead: bool = option(False, heading="Method")
    rebalance: bool = option(False, heading="Method")

    def __post_init__(self) -> None:
        check_options(self)
        if not 0.0 <= self.shrink < 1.0:
            raise OptionError("lambda is a share", got=self.shrink, expected="from 0, below 1")
        if self.keep_intruders and not (self.drop_dead or self.rebalance):
            raise OptionError(
                "no step of the repair is chosen",
                hint="Add `drop_dead=True` or `rebalance=True`, or both",
            )

    def record(self) -> dict[str, Any]:
        """Return what determines the output's bytes, for its provenance."""
        values: dict[str, Any] = {"drop_dead": self.drop_dead, "rebalance": self.rebalance}
        if not self.keep_intruders:
            values |= {
                "lambda": self.shrink,
                "count": self.intruders.count,
                "epsilon": self.intruders.epsilon,
                "keep_every_rank": self.keep_every_rank,
            }
        return {name: value for name, value in values.items() if value is not False}


@dataclass(frozen=True)
class RepairReport:
    """What happened to one module.

    Attributes:
        name: module path.
        action: `shrunk`, `dropped`, `rebalanced`, `shrunk, rebalanced`, or `kept`.
        rank_in: rank before.
        rank_out: rank after; 0 if dropped.
        intruders: singular vectors that were shrunk, over all experts.
        undetermined: those that the bounds leave open, and that stay.
        change: ‖edits‖/‖ΔW‖, what the repair meant to change.
        relative_error: ‖intended − stored‖/‖intended‖, of squeezing and rounding.
        balance: ‖b‖/‖a‖ before, of rebalanced modules; None of others.
    """

    name: str
    action: str
    rank_in: int
    rank_out: int
    intruders: int
    undetermined: int
    change: float
    relative_error: float
    balance: float | None = None


@dataclass(frozen=True)
class RepairResult:
    """The repaired adapter, not yet written.

    Attributes:
        adapter: to be given to `write_adapter`.
        modules: one report each, in path order.
        change: ‖edits‖/‖ΔW‖ over all modules.
        relative_error: ‖intended − stored‖/‖intended‖ over all modules.
    """

    adapter: Adapter
    modules: tuple[RepairReport, ...]
    change: float
    relative_error: float
