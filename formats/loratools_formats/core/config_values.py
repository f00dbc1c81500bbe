"""Configurations from strangers, whose values are checked as they are used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from loratools_formats.disk.errors import AdapterError


class Values:
    """A configuration whose keys are checked as they are used.

    Args:
        values: the parsed JSON object.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def _value(self, key: str, types: tuple[type, ...], expected: str) -> Any:
        if key not in self._values:
            raise AdapterError(f"config lacks {key}", expected=expected)
        value = self._values[key]
        finite = not isinstance(value, float) or math.isfinite(value)
        if type(value) not in types or not finite:
            raise AdapterError(f"config value {key} is wrong", got=value, expected=expected)
        return value

    def number(self, key: str) -> float:
        """Return a number."""
        return float(self._value(key, (int, float), "a number"))

    def number_or_none(self, key: str) -> float | None:
        """Return a number, None if the key is absent or null."""
        return None if self._values.get(key) is None else self.number(key)

    def count(self, key: str) -> int:
        """Return a whole number above 0."""
        value: int = self._value(key, (int,), "a whole number above 0")
        if value < 1:
            raise AdapterError(
                f"config value {key} is wrong", got=value, expected="a whole number above 0"
            )
        return value

    def whole(self, key: str) -> int:
        """Return a whole number."""
        value: int = self._value(key, (int,), "a whole number")
        return value

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        value: bool = self._value(key, (bool,), "true or false")
        return value

    def flag_or_false(self, key: str) -> bool:
        """Return a boolean, False if the key is absent or null."""
        return False if self._values.get(key) is None else self.flag(key)

    def text(self, key: str) -> str:
        """Return a string."""
        value: str = self._value(key, (str,), "a string")
        return value

    def names(self, key: str, path: str) -> bool:
        """Return whether a regular expression, or an entry of a list, names a module."""
        found: str | list[Any] = self._value(key, (str, list), "names of modules")
        if isinstance(found, str):
            return re.fullmatch(found, path) is not None
        return any(path.endswith(entry) for entry in found if isinstance(entry, str))

    def indices(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers, none below 0."""
        found: list[Any] = self._value(key, (list,), "a list of whole numbers")
        if not all(type(number) is int and number >= 0 for number in found):
            raise AdapterError(
                f"config value {key} is wrong", got=found, expected="a list of whole numbers"
            )
        return tuple(found)

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None
