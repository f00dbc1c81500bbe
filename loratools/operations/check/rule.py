"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loratools_formats.core.findings import Severity

if TYPE_CHECKING:
    from loratools.operations.check.remedy import Remedy
    from loratools.operations.check.subject import Subject

Group = Literal[
    "files", "structure", "configuration", "numbers", "no-ops", "targets", "publication"
]

GROUPS: dict[Group, str] = {
    "files": "What lies in the files beside tensors, and what could run.",
    "structure": "Whether tensors make up an adapter.",
    "configuration": "Whether the configuration fits the tensors, and what else it says.",
    "numbers": "What the values are; these rules read every tensor.",
    "no-ops": "Adapters that load without an error, but do nothing or make another change.",
    "targets": "What a serving program refuses or leaves out; only with `target`.",
    "publication": "What a reader of the Hub page misses.",
}
"""Groups of rules, in the order of the first digit of their codes, and what each is about."""


@dataclass(frozen=True)
class Found:
    """What a rule found.

    Attributes:
        message: what was found.
        where: the module, tensor, key or file concerned; None for the whole adapter.
        file: the file of the folder that it stands in; None for the weights.
        hint: what to do, where the rule's fix does not say it for this adapter.
        remedy: what `fix` does about it; None if nothing can.
        target: the serving program that it is about.
        severity: where it differs from the rule's.
    """

    message: str
    where: str | None = None
    file: str | None = None
    hint: str = ""
    remedy: Remedy | None = None
    target: str | None = None
    severity: Severity | None = None


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        code: `LT` and three digits, never used again for another rule.
        slug: its name.
        severity: `error` where an adapter cannot be used or does another thing than it says.
        summary: what it finds, in one sentence.
        why: why that matters.
        fix: what to do.
        source: where the claim comes from.
        check: the function; None if readers find it.
        of_readers: codes of readers' findings that are this rule's.
        statistical: whether it compares with what is usual, and may be wrong about one adapter.
        reads_values: whether it reads tensors, and not only headers.
        key: the key of the configuration that it is about, where findings name a module.
    """

    code: str
    slug: str
    severity: Severity
    summary: str
    why: str
    fix: str
    source: str
    check: Callable[[Subject], Iterator[Found]] | None = None
    of_readers: tuple[str, ...] = ()
    statistical: bool = False
    reads_values: bool = False
    key: str = ""

    @property
    def group(self) -> Group:
        """The group that the first digit of its code names."""
        return list(GROUPS)[_DIGITS.index(self.code[2])]


_DIGITS = "0123457"
