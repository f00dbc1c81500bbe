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

from loratools.algebra.ranks import RankRule, as_options
from loratools.work.declared import build
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
        object.__setattr__(self, "ranks", tuple(self.ranks))
        object.__setattr__(self, "steps", tuple(self.steps))
        if len(self.ranks) != len(self.steps) or not self.ranks:
            raise OptionError(
                "a schedule has one rank and one number of steps for each stage",
                got=f"{len(self.ranks)} ranks, {len(self.steps)} numbers of steps",
            )
        numbers = [rank for rank in self.ranks if not isinstance(rank, RankRule)]
        if not all(type(number) is int and number > 0 for number in [*numbers, *self.steps]):
            raise OptionError("ranks and steps are whole numbers above 0", got=repr(self))
        if any(after >= before for before, after in itertools.pairwise(numbers)):
            raise OptionError("the ranks of a schedule fall", got=", ".join(map(str, numbers)))
        for rank in self.ranks:
            if isinstance(rank, RankRule) and not rank.is_given:
                raise OptionError("a rule of the schedule chooses no rank", got=repr(rank))

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
        if steps < len(ranks):
            raise OptionError(
                f"too few steps for {len(ranks)} stages",
                got=steps,
                expected=f"at least {len(ranks)}",
                hint="Give more `steps`, or fewer `stages`",
            )
        share, rest = divmod(steps, max(len(ranks), 1))
        given = tuple(share + (place >= len(ranks) - rest) for place in range(len(ranks)))
        return cls(tuple(ranks), given)

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
        if steps < least_steps * len(ranks):
            raise OptionError(
                f"too few steps for {len(ranks)} stages of at least {least_steps}",
                got=steps,
                expected=f"at least {least_steps * len(ranks)}",
                hint="Give a lower `least_steps`, or fewer `stages`",
            )
        given: dict[int, int] = {}
        while True:  # stages whose share is too small get the least, and the others share the rest
            others = [place for place in range(len(ranks)) if place not in given]
            left, weight = steps - sum(given.values()), sum(ranks[place] for place in others)
            small = [place for place in others if left * ranks[place] < least_steps * weight]
            given |= dict.fromkeys(small, least_steps)
            if not small:
                break
        shares = {place: left * ranks[place] // weight for place in others}
        rest = left - sum(shares.values())
        by_fraction = sorted(others, key=lambda place: (-(left * ranks[place] % weight), place))
        given |= {place: shares[place] + (place in by_fraction[:rest]) for place in others}
        return cls(tuple(ranks), tuple(given[place] for place in range(len(ranks))))

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
        ranks = [
            rank if isinstance(rank, int) else {"rule": as_values(rank)} for rank in self.ranks
        ]
        return {"ranks": ranks, "steps": list(self.steps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SqueezeSchedule:
        """Return the schedule that `to_dict` described."""
        ranks = [rank if isinstance(rank, int) else _rule(rank["rule"]) for rank in values["ranks"]]
        return cls(tuple(ranks), tuple(values["steps"]))


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


def as_values(rule: RankRule) -> dict[str, Any]:
    """Return a rule as JSON values from which the same rule can be made."""
    values = dict(as_options(rule))
    if rule.budget is not None:
        share, nbytes = rule.budget.share, rule.budget.nbytes
        values["budget"] = str(nbytes) if share is None else f"{share * 100!r}%"
    return values


def _rule(values: Mapping[str, Any]) -> RankRule:
    renamed = {"patterns": "rank_pattern", "serve": "serve_ranks"}
    given = {renamed.get(name, name): value for name, value in values.items()}
    if "rank_pattern" in given:
        given["rank_pattern"] = [f"{pattern}={rank}" for pattern, rank in given["rank_pattern"]]
    rule: RankRule = build(RankRule, given)
    return rule
