"""What became of one adapter of a fleet, as a line of the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from loratools.pipeline.fleet.origin import Seen

State = Literal["made", "done", "found", "failed", "planned"]


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter.

    Attributes:
        name: its name among the fleet.
        source: what was read.
        output: where its output is; None if it has none.
        state: made now, done before, found (a check or a verification found something), failed, or
            planned on a dry run.
        key: sha256 of the operation, its options, the version and all inputs; None if unknown.
        digest: of the output's first weight file, or of the report; None if there is none.
        result: the numbers and words of the result, without its lists; None if it was done before.
        error: why it failed; None if it did not.
        retried: why a first try failed, after which there was a second; None if there was one.
        seconds: that it took.
        seen: of an adapter in an object store the files by name, each with the store's mark of its
            content and its sha256; None of any other.
    """

    name: str
    source: str
    output: str | None
    state: State
    key: str | None
    digest: str | None
    result: Mapping[str, Any] | None
    error: str | None
    retried: str | None
    seconds: float
    seen: Seen | None = None

    def line(self) -> dict[str, Any]:
        """Return it as the line of a manifest."""
        return asdict(self)

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Outcome:
        """Return what a line of a manifest tells.

        Raises:
            KeyError: it lacks something.
            TypeError: something in it is of another type than in ours.
        """
        for one in fields(cls):
            if not isinstance(line[one.name], _LINE[one.name]):
                raise TypeError(f"{one.name} is of the wrong type")
        return cls(**{one.name: line[one.name] for one in fields(cls)})


_WORDS = (str, type(None))
_LINE: dict[str, type | tuple[type, ...]] = {
    "name": str, "source": str, "output": _WORDS, "state": str, "key": _WORDS, "digest": _WORDS,
    "result": (dict, type(None)), "error": _WORDS, "retried": _WORDS, "seconds": (int, float),
    "seen": (dict, type(None)),
}  # fmt: skip
"""Types of what a line of a manifest tells, as JSON has them."""
