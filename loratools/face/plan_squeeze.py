"""`plan_squeeze`: a schedule of squeezes while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratools.face.declare import public
from loratools.face.result import Result
from loratools.operations.plan_squeeze import (
    Planning,
    StagePlan,
    TrainerName,
    snippet,
    stages_of,
)


@dataclass(frozen=True, kw_only=True, repr=False)
class PlanSqueezeResult(Result):
    """A schedule of ranks and steps.

    Attributes:
        stages: in order.
        steps: of all stages.
        mean_rank: over all steps, which is what the factors' arithmetic is proportional to.
        trainer: whose configuration the snippet is for.
        snippet: what to write there.
    """

    operation: ClassVar[str] = "plan-squeeze"

    stages: tuple[StagePlan, ...]
    steps: int
    mean_rank: float
    trainer: TrainerName
    snippet: str


@public()
def plan_squeeze(*, planning: Planning) -> PlanSqueezeResult:
    """Plan a training run whose rank falls in stages, by a squeeze at each boundary.

    >>> import loratools as lt
    >>> plan = lt.plan_squeeze(start=64, target=8, steps=3000)
    >>> [(stage.rank, stage.steps) for stage in plan.stages]
    [(64, 750), (32, 750), (16, 750), (8, 750)]

    Raises:
        OptionError: a number is missing, or there is no such schedule.
    """
    schedule = planning.schedule()
    stages = stages_of(schedule)
    return PlanSqueezeResult(
        stages=stages,
        steps=schedule.total,
        mean_rank=sum(stage.rank * stage.steps for stage in stages) / schedule.total,
        trainer=planning.trainer,
        snippet=snippet(schedule, planning.trainer),
    )
