"""Configurations from strangers, whose values are checked as they are used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from loratools_formats.disk.errors import AdapterError

LOOPS = 1000
"""The largest count of a configuration that a loop runs over; PEFT's defaults are below 10."""

_LARGEST = 2**63 - 1  # torch and PEFT hold whole numbers in 64 bits


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
        value = self._value(key, (int, float), "a number")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise self._wrong(key, "a number of at most 64 bits")
        return float(value)

    def number_or_none(self, key: str) -> float | None:
        """Return a number, None if the key is absent or null."""
        return None if self._values.get(key) is None else self.number(key)

    def share(self, key: str) -> float:
        """Return a number from 0 to 1."""
        value = self.number(key)
        if not 0.0 <= value <= 1.0:
            raise self._wrong(key, "a number from 0 to 1")
        return value

    def count(self, key: str, most: int = 2**31 - 1, least: int = 1) -> int:
        """Return a whole number no less than `least` and no greater than `most`."""
        value: int = self._value(key, (int,), "a whole number")
        if not least <= value <= most:
            raise self._wrong(key, f"a whole number from {least} to {most}")
        return value

    def whole(self, key: str) -> int:
        """Return a whole number."""
        value: int = self._value(key, (int,), "a whole number")
        if abs(value) > _LARGEST:
            raise self._wrong(key, "a whole number of at most 64 bits")
        return value

    def _wrong(self, key: str, expected: str) -> AdapterError:
        return AdapterError(
            f"config value {key} is wrong", got=_short(self._values[key]), expected=expected
        )

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

    def is_text(self, key: str) -> bool:
        """Return whether a key is there and holds a string."""
        return isinstance(self._values.get(key), str)

    def names(self, key: str) -> str | list[Any]:
        """Return a regular expression, or a list of ends of names."""
        found: str | list[Any] = self._value(key, (str, list), "names of modules")
        return found

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


def _short(value: Any) -> Any:
    """Return a value as messages show it: an endless whole number by its length."""
    is_long = isinstance(value, int) and abs(value) > _LARGEST
    return f"a number of {value.bit_length()} bits" if is_long else value
