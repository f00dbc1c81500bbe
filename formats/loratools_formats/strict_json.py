"""JSON parsing for files from strangers: what two parsers could read differently is refused.

Python's parser takes duplicate keys (last wins), NaN, huge integers and deep nesting. Each is
either ambiguous between readers or a way to hang one, so all are errors here.
"""

from __future__ import annotations

import json
from typing import Any

MAX_INTEGER_DIGITS = 20


class StrictJsonError(ValueError):
    """The text is not JSON that every parser reads alike."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJsonError(f"duplicate key {key!r}")
            seen.add(key)
    return result


def _integer(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise StrictJsonError(f"integer of {len(text)} digits")
    return int(text)


def _constant(text: str) -> float:
    raise StrictJsonError(f"{text} is not JSON")


def loads(data: bytes) -> Any:
    """Parse UTF-8 JSON.

    Raises:
        StrictJsonError: not UTF-8, a byte order mark, duplicate keys at any level, NaN or
            Infinity, integers over 20 digits, nesting too deep, lone surrogates, or no JSON.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from error
    if text.startswith("\ufeff"):
        raise StrictJsonError("starts with a byte order mark")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_constant=_constant
        )
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"{error.msg} at byte {error.pos}") from error
    if "\\ud" in text.lower():
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if any("\ud800" <= c <= "\udfff" for c in item):
                raise StrictJsonError("lone surrogate in a string")
        elif isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
