"""Writing PEFT's `rank_pattern` and `alpha_pattern` so that a key matches one module and no other.

Matching the keys of files is elsewhere, since it needs care; what is written here is plain names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

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


def settings_of(
    settings: Mapping[str, tuple[int, float]], usual: tuple[int, float] | None = None
) -> dict[str, Any]:
    """Return the keys of a configuration that give each module its rank and alpha.

    >>> settings_of({"q": (8, 16), "v": (4, 16)})
    {'r': 8, 'lora_alpha': 16, 'rank_pattern': {'v': 4}, 'alpha_pattern': {}}

    Args:
        settings: (rank, alpha) by module path.
        usual: those that need no pattern; by default the first of the highest rank.
    """
    rank, alpha = usual or max(settings.values(), key=lambda setting: setting[0])
    pattern_for = PatternsOf(list(settings)).pattern_for
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_for(name): r for name, (r, _) in settings.items() if r != rank},
        "alpha_pattern": {pattern_for(name): a for name, (_, a) in settings.items() if a != alpha},
    }


def blanked(text: str, places: tuple[int, ...]) -> str:
    """Return a text with dots in these places."""
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)
