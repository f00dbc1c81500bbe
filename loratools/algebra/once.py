"""A property that is computed once for each object, side by side for different objects.

`functools.cached_property` of Python 3.11 holds one lock for all objects of a class while it
computes, so that threads over modules decompose one after the other. Later versions hold none.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

T = TypeVar("T")

if TYPE_CHECKING or sys.version_info >= (3, 12):
    from functools import cached_property as once
else:

    class once(Generic[T]):  # noqa: N801 - it is used as a decorator
        """Takes the place of a method; of two threads that ask one object, both compute."""

        def __init__(self, function: Callable[[Any], T]) -> None:
            self._function = function
            self.__doc__ = function.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = self._function(instance)
            instance.__dict__[self._name] = value  # found before this from now on
            return value


__all__ = ["once"]
