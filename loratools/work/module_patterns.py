"""Regular expressions that choose modules by the beginnings of their paths."""

from __future__ import annotations

import re
from collections.abc import Iterable


def pattern_of(modules: Iterable[str], shared: Iterable[str]) -> str:
    r"""Return an expression for modules, and for none of those that are `shared`.

    >>> pattern_of(["vision.0.q", "vision.1.q", "head"], ["text.0.q"])
    '^(vision(\\.|$)|head(\\.|$))'
    """
    taken = {start for name in shared for start in _starts(name)}
    own: dict[str, None] = {}
    for module in modules:
        start = next((each for each in _starts(module) if each not in taken), None)
        own[rf"{re.escape(start)}(\.|$)" if start else f"{re.escape(module)}$"] = None
    return f"^({'|'.join(own)})" if len(own) > 1 else f"^{next(iter(own))}"


def _starts(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
