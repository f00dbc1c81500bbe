"""Errors of a recipe: the line, the key, what was found, what would have been right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loratools.pipeline.schema import step_types
from loratools_formats.disk.errors import LoratoolsError, OptionError
from loratools_formats.disk.strict_yaml import Place

_AT = re.compile(r" - at (`key` in )?`\$(.*?)`$")
_PART = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_TOP = ("version", "variables", "steps")


def closest(name: str, known: Sequence[str]) -> str | None:
    """Return a hint with the known name that is like another, None if none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {close[0]}?" if close else None


class Places:
    """Where the values of a recipe are.

    Args:
        path: of its file.
        lines: of every key and item.
    """

    def __init__(self, path: Path, lines: Mapping[Place, int]) -> None:
        self.path, self._lines = path, lines

    def fail(self, place: Place, message: str, **others: Any) -> OptionError:
        """Return an error that names the line and the key of a place."""
        while place not in self._lines:
            place = place[:-1]
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
        where = f"line {self._lines[place]}" + (f", {key.lstrip('.')}" if key else "")
        return OptionError(f"{where}: {message}", path=self.path, **others)

    def at(self, place: Place, error: LoratoolsError) -> OptionError:
        """Return an error of an option with the line and the key in front."""
        return self.fail(
            place, error.message, got=error.got, expected=error.expected, hint=error.hint
        )

    def worded(self, error: msgspec.ValidationError, content: Any) -> OptionError:
        """Return what msgspec found, with the line and with what would have been right.

        Args:
            error: names the place as `$.steps[0].rank`.
            content: what it looked at.
        """
        text = str(error)
        found = _AT.search(text)
        message = text if found is None else text[: found.start()]
        parts = [] if found is None else _PART.findall(found[2])
        place: Place = tuple(name or int(index) for name, index in parts if index != "...")
        unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
        missing = re.fullmatch(r"Object missing required field `(.*)`", message)
        if unknown is not None:
            known = list(_known_at(place, content))
            hint = closest(unknown[1], known)
            expected = None if hint else ", ".join(known)
            return self.fail(
                (*place, unknown[1]), "unknown key", got=unknown[1], expected=expected, hint=hint
            )
        if missing is not None:
            return self.fail(place, f"{missing[1]} is missing")
        got = content
        for part in place:
            got = got[part] if isinstance(part, int) or isinstance(got, dict) else None
        shown = got if isinstance(got, str | int | float | bool) else type(got).__name__
        if place and place[-1] == "do":
            expected = ", ".join(step_types())
            return self.fail(place, "no such operation", got=shown, expected=expected)
        return self.fail(place, message[0].lower() + message[1:], got=shown)


def _known_at(place: Place, content: Any) -> Iterator[str]:
    """Yield the keys that a map may have: the recipe, a step, or an adapter with its weight."""
    if len(place) < 2 or place[0] != "steps":
        yield from _TOP
    elif len(place) > 2:
        yield from ("path", "weight")
    else:
        yield from ("name", "do")
        found = step_types().get(content["steps"][place[1]].get("do"))
        if found is not None:
            names = (one.name for one in msgspec.structs.fields(found[0]))
            yield from (name for name in names if name != "name")
