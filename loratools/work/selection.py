"""Which modules an operation touches."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loratools.work.declared import option
from loratools.work.regexes import check_regex, is_found
from loratools.work.typed import check_options
from loratools_formats.contract.commands import module_paths_hint
from loratools_formats.disk.errors import AdapterError


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


def require_selected(
    selection: Selection, names: Iterable[str], what: str, path: Path | None
) -> None:
    """Refuse a selection that holds none of an adapter's modules.

    Args:
        selection: what was asked for.
        names: of the modules.
        what: is to be done with them, as an infinitive.
        path: of the adapter.

    Raises:
        AdapterError: none is in it.
    """
    names = list(names)
    if any(name in selection for name in names):
        return
    hint = module_paths_hint(path)
    if selection.include is not None and "," in selection.include:
        joined = shlex.quote("|".join(filter(None, re.split(r"\s*,\s*", selection.include))))
        hint = f"Several patterns are joined by |, as in `include={joined}`. {hint}"
    raise AdapterError(
        f"no module to {what}",
        path=path,
        got=f"{len(names)} modules in the adapter, none of them selected",
        expected=f"such as {names[0]}" if names else None,
        hint=hint,
    )


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
