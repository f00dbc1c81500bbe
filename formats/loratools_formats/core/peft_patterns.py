"""Writing PEFT's `rank_pattern` and `alpha_pattern` so that a key matches one module and no other.

Matching the keys of files is elsewhere, since it needs care; what is written here is plain names.
"""

from __future__ import annotations

import re
from collections import Counter

_WRITTEN_PLAIN = re.compile(r"[\w.-]+")


class PatternsOf:
    """Writes a pattern for each of many names, in time that grows with their number.

    Args:
        names: of all modules.
    """

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._counts: dict[tuple[int, ...], Counter[str]] = {}

    def pattern_for(self, name: str) -> str:
        r"""Return a pattern that matches `name` and no other name.

        The plain name where that is enough, since other tools look names up literally; else the
        anchored, escaped one.

        >>> PatternsOf(["layers.1.q", "layers.2.q"]).pattern_for("layers.1.q")
        'layers.1.q'
        >>> PatternsOf(["layers.1.q", "model.layers.1.q"]).pattern_for("layers.1.q")
        '^layers\\.1\\.q'
        """
        if _WRITTEN_PLAIN.fullmatch(name) and self._matches(name) <= 1:
            return name
        return "^" + re.escape(name)

    def _matches(self, name: str) -> int:
        r"""Return how many names the plain name matches: `(.*\.)?name`, its dots any character."""
        dots = tuple(i for i, c in enumerate(name) if c == ".")
        key = (len(name), *dots)
        if key not in self._counts:
            self._counts[key] = Counter(
                blanked(other[-len(name) :], dots)
                for other in self._names
                if len(other) == len(name) or other[: -len(name)].endswith(".")
            )
        return self._counts[key][blanked(name, dots)]


def blanked(text: str, places: tuple[int, ...]) -> str:
    """Return a text with dots in these places."""
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)
