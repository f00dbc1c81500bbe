"""The options of a check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loratools.operations.check.rules import rules_named
from loratools.operations.check.targets import Target, target_named
from loratools.work.declared import option
from loratools.work.typed import check_options

FailOn = Literal["error", "warning", "note", "never"]


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What to check, and for what.

    Attributes:
        select: check only rules of this code, beginning of a code, or name.
        ignore: leave out rules of this code, beginning of a code, or name.
        target: check for this serving program: vllm, llamacpp, mlx, diffusers and others.
        headers_only: read no tensor; leaves out LT107 and the rules LT3.
        baseline: accept the findings that this file lists.
        fail_on: fail (exit code 1) for findings of this severity or worse; warning by default.

    Raises:
        OptionError: no such rule or target.
    """

    select: tuple[str, ...] = option((), heading="Selection", metavar="RULE")
    ignore: tuple[str, ...] = option((), heading="Selection", metavar="RULE")
    target: tuple[str, ...] = option((), heading="Method", metavar="NAME")
    headers_only: bool = option(False, heading="Method")
    baseline: Path | None = option(None, heading="Report", metavar="FILE")
    fail_on: FailOn | None = option(None, heading="Report")

    def __post_init__(self) -> None:
        check_options(self)
        rules_named((*_split(self.select), *_split(self.ignore)))
        self.targets()

    def codes(self) -> frozenset[str]:
        """Return the codes of the rules that run."""
        chosen = rules_named(_split(self.select) or ["LT"]) - rules_named(_split(self.ignore))
        return frozenset(
            rule.code
            for rule in chosen
            if not (self.headers_only and (rule.reads_values or rule.group == "numbers"))
        )

    def targets(self) -> tuple[Target, ...]:
        """Return the serving programs, each once."""
        return tuple(dict.fromkeys(target_named(text) for text in _split(self.target)))


@dataclass(frozen=True, kw_only=True)
class FixOptions:
    """What to fix.

    Attributes:
        fix: run the commands that fix what was found, and check the result again.
        allow_lossy: leave out what the format cannot hold.
    """

    fix: bool = option(False, heading="Output")
    allow_lossy: bool = option(False, heading="Output")


def _split(texts: tuple[str, ...]) -> list[str]:
    """Return what stands between commas."""
    return [part for text in texts for part in text.split(",") if part.strip()]
