"""Results as JSON objects: dataclasses whose fields say under which name they appear, if at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

_NAME = "json"


def hidden(**options: Any) -> Any:
    """Declare a field of a result that is no part of its JSON object."""
    return field(metadata={_NAME: None}, **options)


def named(name: str, **options: Any) -> Any:
    """Declare a field of a result that has another name in its JSON object."""
    return field(metadata={_NAME: name}, **options)


def json_name(of: Any) -> str | None:
    """Return the name of a result's field in its JSON object; None if it is no part of it."""
    name: str | None = of.metadata.get(_NAME, of.name)
    return name


def as_json(value: Any) -> Any:
    """Return a value in the types of JSON: dataclasses as objects, tuples as arrays."""
    if is_dataclass(value):
        names = {json_name(one): one.name for one in fields(value)}
        return {key: as_json(getattr(value, name)) for key, name in names.items() if key}
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value
