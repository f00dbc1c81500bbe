"""Schedules of ranks over a training run: how many steps at which rank, and what comes next.

Arithmetic alone: no torch, no files. `loratools.training` squeezes models by a schedule, and
`plan-squeeze` prints one. Source of the scheme: LoRA-Squeeze, arXiv 2602.10993 (In-Squeeze: ranks
fall over a fixed number of steps; Cont-Squeeze: one squeeze, and some steps after it).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.algebra.ranks import RankRule
from loratools.work.call import as_value
from loratools.work.typed import converted, hints
from loratools_formats.disk.errors import OptionError

LEAST_STEPS = 200
"""Steps that the paper gives each stage at least, where steps are allotted by rank."""


@dataclass(frozen=True)
class SqueezeSchedule:
    """Ranks and steps of the stages of a training run.

    >>> SqueezeSchedule.geometric(64, 8, steps=3000)
    SqueezeSchedule(ranks=(64, 32, 16, 8), steps=(750, 750, 750, 750))
    >>> SqueezeSchedule.by_rank((64, 32, 16, 8), steps=3000)
    SqueezeSchedule(ranks=(64, 32, 16, 8), steps=(1600, 800, 400, 200))

    Attributes:
        ranks: of each stage; a `RankRule` in place of a number chooses each module's rank at the
            start of its stage. The first is the rank that training starts with.
        steps: optimizer steps of each stage. The last stage lasts as long as training does.

    Raises:
        OptionError: no stage, ranks that do not fall, or a stage without steps.
    """

    ranks: tuple[int | RankRule, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, hint in hints(SqueezeSchedule).items():
            object.__setattr__(self, name, converted(name, getattr(self, name), hint))
        numbers = [rank for rank in self.ranks if isinstance(rank, int)]
        rules = [rank for rank in self.ranks if isinstance(rank, RankRule)]
        problems = {
            "a schedule has one rank and one number of steps for each stage": (
                not len(self.ranks) == len(self.steps) > 0
            ),
            "ranks and steps are above 0": any(number < 1 for number in (*numbers, *self.steps)),
            "the ranks of a schedule fall": any(a <= b for a, b in itertools.pairwise(numbers)),
            "a rule of the schedule chooses no rank": any(not rule.is_given for rule in rules),
        }
        for problem, applies in problems.items():
            if applies:
                raise OptionError(problem, got=repr(self))

    @property
    def start(self) -> int | None:
        """The rank that training starts with; None if the schedule leaves it to the model."""
        return self.ranks[0] if isinstance(self.ranks[0], int) else None

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(self.steps)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Numbers of steps done after which the next stage begins."""
        return tuple(itertools.accumulate(self.steps[:-1]))

    def rule_after(self, step: int) -> RankRule | None:
        """Return the rule to squeeze by once `step` steps are done; None if none is due."""
        if step not in self.boundaries:
            return None
        rank = self.ranks[self.boundaries.index(step) + 1]
        return rank if isinstance(rank, RankRule) else RankRule(rank=rank)

    def stage_after(self, step: int) -> int:
        """Return the stage, counted from 0, that the step after `step` steps belongs to."""
        return sum(boundary <= step for boundary in self.boundaries)

    @classmethod
    def equal_steps(cls, ranks: Sequence[int | RankRule], steps: int) -> SqueezeSchedule:
        """Return a schedule whose stages have equally many steps; the last ones get what is left.

        Args:
            ranks: of each stage.
            steps: of all stages together.

        Raises:
            OptionError: fewer steps than stages.
        """
        _check_steps(steps, len(ranks), 1)
        share, rest = divmod(steps, max(len(ranks), 1))
        given = (share + (place >= len(ranks) - rest) for place in range(len(ranks)))
        return cls(tuple(ranks), tuple(given))

    @classmethod
    def by_rank(
        cls, ranks: Sequence[int], steps: int, *, least_steps: int = LEAST_STEPS
    ) -> SqueezeSchedule:
        """Return a schedule whose stages have steps in proportion to their rank.

        Args:
            ranks: of each stage.
            steps: of all stages together.
            least_steps: that each stage gets at least.

        Raises:
            OptionError: too few steps for that.
        """
        _check_steps(steps, len(ranks), least_steps)
        given: list[int] = []
        left, weight = steps, sum(ranks)
        for rank in reversed(ranks):  # the lowest first, since their shares may be too small
            given.insert(0, max(least_steps, round(left * rank / weight)))
            left, weight = left - given[0], weight - rank
        return cls(tuple(ranks), tuple(given))

    @classmethod
    def geometric(
        cls, start: int, target: int, steps: int, *, stages: int | None = None
    ) -> SqueezeSchedule:
        """Return a schedule of equal steps whose ranks fall by equal factors.

        Args:
            start: rank of the first stage.
            target: rank of the last.
            steps: of all stages together.
            stages: how many; by default each rank is about half of the one before.
        """
        return cls.equal_steps(geometric_ranks(start, target, stages), steps)

    @classmethod
    def at_boundaries(
        cls, start: int, rules: Sequence[int | RankRule], steps: int
    ) -> SqueezeSchedule:
        """Return a schedule of equal steps with a rule, such as a budget, at each boundary.

        >>> SqueezeSchedule.at_boundaries(64, [RankRule(energy=0.9), 8], steps=300).boundaries
        (100, 200)

        Args:
            start: rank of the first stage.
            rules: for each later stage, a rank or a rule, by which ranks may differ by module. A
                budget that is a share is one of the weights as they are at the boundary.
            steps: of all stages together.
        """
        return cls.equal_steps([start, *rules], steps)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return dict(as_value(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SqueezeSchedule:
        """Return the schedule that `to_dict` described.

        Raises:
            OptionError: the values describe none.
        """
        made: SqueezeSchedule = converted("schedule", values, cls)
        return made


def _check_steps(steps: int, stages: int, least: int) -> None:
    if steps < least * stages:
        raise OptionError(
            f"too few steps for {stages} stages of at least {least}",
            got=steps,
            expected=f"at least {least * stages}",
            hint="Give more `steps`, fewer `stages` or a lower `least_steps`",
        )


def geometric_ranks(start: int, target: int, stages: int | None = None) -> tuple[int, ...]:
    """Return ranks from `start` to `target` that fall by equal factors.

    >>> geometric_ranks(64, 8), geometric_ranks(64, 2, 3)
    ((64, 32, 16, 8), (64, 11, 2))

    Raises:
        OptionError: the target is not below the start, or there is no such number of stages.
    """
    if not 0 < target < start:
        raise OptionError("the target rank is below the first", got=f"{start} to {target}")
    if stages is None:
        stages = max(2, 1 + round(math.log2(start / target)))
    if not 2 <= stages <= start - target + 1:
        raise OptionError(
            "no such number of stages", got=stages, expected=f"2 to {start - target + 1}"
        )
    last = stages - 1
    ranks = [round(start * (target / start) ** (place / last)) for place in range(stages)]
    for place in range(1, stages):  # rounding may let two be equal
        ranks[place] = min(ranks[place], ranks[place - 1] - 1)
    for place in range(stages - 1, 0, -1):
        ranks[place] = max(ranks[place], target + last - place)
    return tuple(ranks)
