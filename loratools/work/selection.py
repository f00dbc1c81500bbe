"""Which modules an operation touches."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.work.declared import option
from loratools.work.regexes import check_regex, is_found
from loratools.work.typed import check_options


@dataclass(frozen=True)
class Selection:
    """Which modules an operation touches, by regular expressions searched in their paths.

    Attributes:
        include: work only on modules whose path matches.
        exclude: do not work on modules whose path matches.

    Raises:
        OptionError: not a regular expression.
    """

    include: str | None = option(None, heading="Selection", metavar="REGEX")
    exclude: str | None = option(None, heading="Selection", metavar="REGEX")

    def __post_init__(self) -> None:
        check_options(self)
        for pattern in (self.include, self.exclude):
            if pattern is not None:
                check_regex(pattern)

    def __contains__(self, name: str) -> bool:
        wanted = self.include is None or is_found(self.include, name)
        return wanted and not (self.exclude and is_found(self.exclude, name))

    def record(self) -> dict[str, str]:
        """Return the patterns that were given, for an output's provenance."""
        given = {"include": self.include, "exclude": self.exclude}
        return {name: pattern for name, pattern in given.items() if pattern is not None}


@dataclass(frozen=True)
class Dropping:
    """Which modules leave an adapter, by regular expressions searched in their paths.

    Attributes:
        drop: take modules whose path matches out of the adapter.
        keep: take modules whose path does not match out of the adapter.

    Raises:
        OptionError: not a regular expression.
    """

    drop: str | None = option(None, heading="Selection", metavar="REGEX")
    keep: str | None = option(None, heading="Selection", metavar="REGEX")

    def __post_init__(self) -> None:
        check_options(self)
        for pattern in (self.drop, self.keep):
            if pattern is not None:
                check_regex(pattern)

    @property
    def is_given(self) -> bool:
        """Whether anything is to leave."""
        return self.drop is not None or self.keep is not None

    def __contains__(self, name: str) -> bool:
        """Return whether a module leaves."""
        dropped = self.drop is not None and is_found(self.drop, name)
        return dropped or (self.keep is not None and not is_found(self.keep, name))

    def record(self) -> dict[str, str]:
        """Return the patterns that were given, for an output's provenance."""
        given = {"drop": self.drop, "keep": self.keep}
        return {name: pattern for name, pattern in given.items() if pattern is not None}
