"""What `fix` does about a finding: commands of this tool, in an order that lets each see the last.

A remedy is declared here and run by the face, which has the functions of the commands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loratools_formats.contract.commands import command_on
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter

Kind = Literal["plain", "rank", "uniform", "tidy", "drop-dead", "rebalance", "format", "rewrite"]

ORDER: tuple[Kind, ...] = (
    "plain", "drop-dead", "rebalance", "rank", "uniform", "tidy", "format", "rewrite",
)  # fmt: skip
LOSSY: frozenset[Kind] = frozenset({"plain", "rank"})
"""Remedies that may change ΔW by more than rounding."""

_COMMANDS: dict[Kind, tuple[str, str]] = {
    "plain": ("loratools to-lora --energy 1", "plain"),
    "rank": ("loratools squeeze --rank {}", "smaller"),
    "uniform": ("loratools squeeze --uniform --rank {}", "uniform"),
    "tidy": ("loratools squeeze --energy 1", "tidy"),
    "drop-dead": ("loratools repair --keep-intruders --drop-dead", "tidy"),
    "rebalance": ("loratools repair --keep-intruders --rebalance", "balanced"),
    "format": ("loratools convert --to {}", "converted"),
    "rewrite": ("loratools convert --to {}", "rewritten"),
}


@dataclass(frozen=True)
class Remedy:
    """One step of a fix.

    Attributes:
        kind: which.
        value: a rank or a format, for the kinds that take one.
        base: whether the base model is needed.
    """

    kind: Kind
    value: int | str | None = None
    base: bool = False

    @property
    def is_lossy(self) -> bool:
        """Whether ΔW may change by more than rounding."""
        return self.kind in LOSSY

    def command(self, adapter: Adapter | None) -> str:
        """Return the command line that does it."""
        command, output = _COMMANDS[self.kind]
        _, verb, options = command.format(self.value).split(" ", 2)
        text = (
            command_on(adapter, verb, options, "--base MODEL", output=output)
            if self.base
            else command_on(adapter, verb, options, output=output)
        )
        if self.kind != "format":
            return text
        # Another format has another suffix, or none.
        suffix = "" if get_format(str(self.value)).naming is None else ".safetensors"
        return f"{text.rpartition(' ')[0]} {output}{suffix}"


def in_order(remedies: set[Remedy]) -> list[Remedy]:
    """Return the steps of a fix; of two ranks the smaller, and no rank before a uniform one."""
    kinds = {kind: [r for r in remedies if r.kind == kind] for kind in ORDER}
    chosen = [min(each, key=_least) for each in kinds.values() if each]
    ranks = [r for r in chosen if r.kind == "rank"]
    uniform = [r for r in chosen if r.kind == "uniform"]
    if ranks and uniform:
        least = min(_whole(ranks[0]), _whole(uniform[0]))
        chosen = [r for r in chosen if r.kind != "uniform"]
        chosen[chosen.index(ranks[0])] = Remedy("rank", least)
        chosen.insert(chosen.index(Remedy("rank", least)) + 1, Remedy("uniform", least))
    if uniform or ranks:
        chosen = [r for r in chosen if r.kind != "tidy"]
    if any(r.kind == "format" for r in chosen):
        chosen = [r for r in chosen if r.kind != "rewrite"]
    return chosen


def _least(remedy: Remedy) -> tuple[int, str, bool]:
    return _whole(remedy), str(remedy.value), remedy.base


def _whole(remedy: Remedy) -> int:
    return remedy.value if isinstance(remedy.value, int) else 0
