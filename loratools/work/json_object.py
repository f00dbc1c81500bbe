"""Results as JSON objects: dataclasses whose fields say under which name they appear, if at all."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

_NAME = "json"
_SPREAD = "json_spread"
_PLAIN = frozenset({bool, float, int, str, type(None)})


def hidden(**options: Any) -> Any:
    """Declare a field of a result that is no part of its JSON object."""
    return field(metadata={_NAME: None}, **options)


def named(name: str, **options: Any) -> Any:
    """Declare a field of a result that has another name in its JSON object."""
    return field(metadata={_NAME: name}, **options)


def spread(**options: Any) -> Any:
    """Declare a dataclass, or None, whose own fields appear in the JSON object in its place."""
    return field(metadata={_SPREAD: True}, **options)


def json_name(of: Any) -> str | None:
    """Return the name of a result's field in its JSON object; None if it is no part of it."""
    name: str | None = of.metadata.get(_NAME, of.name)
    return name


@functools.cache
def spread_types(of: type) -> dict[str, type]:
    """Return the dataclasses of a result's spread fields, by the fields' names."""
    names = [one.name for one in fields(of) if _SPREAD in one.metadata]
    hints = typing.get_type_hints(of) if names else {}
    found: dict[str, type] = {}
    for name in names:
        choices: tuple[Any, ...] = (hints[name], *typing.get_args(hints[name]))
        found[name] = next(c for c in choices if isinstance(c, type) and is_dataclass(c))
    return found


def as_json(value: Any) -> Any:
    """Return a value in the types of JSON: dataclasses as objects, tuples as arrays."""
    if type(value) in _PLAIN:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return _object(value)
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [item if type(item) in _PLAIN else as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _object(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    of: Any = type(value)
    inner = spread_types(of)
    for one in fields(value):
        name, item = json_name(one), getattr(value, one.name)
        if one.name not in inner:
            found |= {name: as_json(item)} if name else {}
        elif item is None:
            found |= dict.fromkeys(filter(None, map(json_name, fields(inner[one.name]))))
        else:
            found |= _object(item)
    return found
