"""The table rank → size → error, as results hold it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loratools.algebra.budget import RankChoice


@dataclass(frozen=True)
class ChoiceRow:
    """What a rank would cost and lose.

    Attributes:
        rank: given to every module that has more.
        bytes: size of the weight file.
        energy: share of ‖ΔW‖²_F kept.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ before rounding to the stored type.
    """

    rank: int
    bytes: int
    energy: float
    relative_error: float


def choice_rows(choices: Iterable[RankChoice]) -> tuple[ChoiceRow, ...]:
    """Return the rows of a table."""
    return tuple(ChoiceRow(row.rank, row.nbytes, row.energy, row.relative_error) for row in choices)
