"""Shards: the part of a fleet that one process takes, set by a batch system or by the user.

Adapter number i, counted from 0 in the order of names, is of shard i mod N + 1: every process
finds the same parts without asking another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from loratools_formats.disk.errors import OptionError

Item = TypeVar("Item")

_MOST_SHARDS = 1_000_000


@dataclass(frozen=True)
class Shard:
    """A part of a fleet.

    Attributes:
        index: which, from 1.
        count: of how many.
    """

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Return the items of this shard.

        >>> [Shard(i, 2).of("abcde") for i in (1, 2)]
        [['a', 'c', 'e'], ['b', 'd']]
        """
        return list(items[self.index - 1 :: self.count])


def shard(text: str) -> Shard:
    """Return the shard that a text names.

    >>> shard("3/8")
    Shard(index=3, count=8)

    Raises:
        OptionError: it names none.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isascii() and index.isdigit() and count.isascii() and count.isdigit()):
        raise OptionError("not a shard", got=text, expected="I/N, such as 3/8")
    return _checked(int(index), int(count), text)


def shard_of_environment(environment: Mapping[str, str] = os.environ) -> Shard:
    """Return the shard that a batch system gave this process; the whole if none did.

    A SLURM array counts from SLURM_ARRAY_TASK_MIN in steps of SLURM_ARRAY_TASK_STEP, an indexed
    Job of Kubernetes from 0. Kubernetes does not tell a Job's size: its manifest must put
    JOB_COMPLETION_COUNT into the environment.

    >>> shard_of_environment({"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETION_COUNT": "8"})
    Shard(index=3, count=8)
    >>> slurm = {"SLURM_ARRAY_TASK_ID": "10", "SLURM_ARRAY_TASK_MIN": "8",
    ...          "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2"}
    >>> shard_of_environment(slurm)
    Shard(index=2, count=4)

    Raises:
        OptionError: an index without a size, one that cannot be, or indices of both.
    """
    if environment.get("SLURM_ARRAY_TASK_ID") and environment.get("JOB_COMPLETION_INDEX"):
        raise OptionError(
            "SLURM_ARRAY_TASK_ID and JOB_COMPLETION_INDEX are both set",
            hint="Unset one, or pass `shard=I/N`",
        )
    if environment.get("SLURM_ARRAY_TASK_ID"):
        number = _number(environment, "SLURM_ARRAY_TASK_ID", None)
        count = _number(environment, "SLURM_ARRAY_TASK_COUNT", None)
        first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(_number(environment, "SLURM_ARRAY_TASK_STEP", 1), 1)
        if (number - first) % step:
            raise OptionError("SLURM_ARRAY_TASK_ID is no task of the array", got=number)
        return _checked((number - first) // step + 1, count, "SLURM_ARRAY_TASK_ID")
    if environment.get("JOB_COMPLETION_INDEX"):
        index = _number(environment, "JOB_COMPLETION_INDEX", None)
        count = _number(environment, "JOB_COMPLETION_COUNT", None)
        return _checked(index + 1, count, "JOB_COMPLETION_INDEX")
    return Shard()


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise OptionError(
            f"{name} is not a number, and a shard needs it",
            got=text or "nothing",
            hint="Set it, or pass `shard=1/1` to take all",
        )
    return int(text)


def _checked(index: int, count: int, text: str) -> Shard:
    if not 1 <= index <= count <= _MOST_SHARDS:
        named = f"{index}/{count}"
        raise OptionError(
            "no such shard",
            got=text if text == named else f"{text}: {named}",
            expected="1/N to N/N",
        )
    return Shard(index, count)
