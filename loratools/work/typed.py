"""Values that users give, checked against the types that dataclasses and functions declare.

Python does not check annotations, and a text where a number is wanted fails far from its cause.
Here a value is what its declaration says, or becomes it without loss (a NumPy integer, a path
given as text), or is refused by the name of its option.
"""

from __future__ import annotations

import functools
import numbers
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union

from loratools.work.declared import Option, declared
from loratools_formats.disk.errors import OptionError

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text",
          Path: "a path"}  # fmt: skip
_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}
_WRONG = object()


@functools.cache
def hints(of: Any) -> Mapping[str, Any]:
    """Return the types that a dataclass or a function declares, by name."""
    return typing.get_type_hints(of)


def check_options(instance: Any) -> None:
    """Bring the options of a frozen dataclass to their types; `__post_init__` calls it first.

    Text is read as on the command line: `RankRule(budget="30%")` works.

    Raises:
        OptionError: a value is of another type, or a text means none; names the option.
    """
    for made in declared(type(instance)):
        value = option_value(type(instance), made, getattr(instance, made.field))
        object.__setattr__(instance, made.field, value)


def option_value(cls: type, made: Option, value: Any) -> Any:
    """Return the value of a dataclass' option, text read and types checked; None stays.

    Raises:
        OptionError: a value is of another type, or a text means none; names the option.
    """
    if isinstance(value, str | Mapping | Sequence) or not (value is None or made.multiple):
        value = made.value(value)
    return converted(made.name, value, hints(cls)[made.field])


def converted(name: str, value: Any, hint: Any) -> Any:
    """Return a value as its declared type; types that cannot be checked are taken on trust.

    >>> converted("rank", 8, int | None), converted("output", "out", Path)
    (8, PosixPath('out'))

    Args:
        name: the option, for messages.
        value: what the user gave.
        hint: the declared type.

    Raises:
        OptionError: the value is of another type.
    """
    choices = _alternatives(hint)
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        found = _as(name, value, choice)
        if found is not _WRONG:
            return found
    expected = " or ".join(_described(choice) for choice in choices if choice is not type(None))
    raise OptionError(f"{name} is of the wrong type", got=repr(value), expected=expected)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _as(name: str, value: Any, hint: Any) -> Any:
    """Return a value as one type, `_WRONG` if it is not of it."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value if isinstance(value, str) and value in typing.get_args(hint) else _WRONG
    if origin is tuple:
        return _as_tuple(name, value, typing.get_args(hint))
    if origin is not None or not isinstance(hint, type) or hint is Any:
        return value
    if isinstance(value, bool) and hint in _NUMBERS:
        return _WRONG
    if hint in _NUMBERS:
        return hint(value) if isinstance(value, _NUMBERS[hint]) else _WRONG
    if hint is Path and isinstance(value, str | os.PathLike):
        return _path(name, value)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _as_instance(name, value, hint)
    return value if isinstance(value, hint) else _WRONG


def _as_instance(name: str, value: Mapping[Any, Any], of: Any) -> Any:
    """Return an instance of a dataclass for a mapping of its fields, as records keep it."""
    known = hints(of)
    for field in value:
        if field not in known:
            raise OptionError(f"{name} has no such field", got=field, expected=", ".join(known))
    return of(**{field: converted(f"{name}.{field}", item, known[field])
                 for field, item in value.items()})  # fmt: skip


def _as_tuple(name: str, value: Any, items: tuple[Any, ...]) -> Any:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return _WRONG
    if items[-1] is Ellipsis:
        return tuple(converted(name, item, items[0]) for item in value)
    if len(value) != len(items):
        return _WRONG
    return tuple(converted(name, item, hint) for item, hint in zip(value, items, strict=True))


def _path(name: str, value: str | os.PathLike[str]) -> Path:
    if not os.fspath(value):
        raise OptionError(f"{name} is an empty path")
    return Path(value)


def _described(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(hint) is tuple:
        each = [_described(item) for item in arguments if item is not Ellipsis]
        return f"a sequence of ({', '.join(each)})" if len(each) > 1 else f"a sequence of {each[0]}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def accepted(hint: Any, made: Option | None = None) -> Any:
    """Return the type of the values that callers may give for a declared type.

    Args:
        hint: the declared type.
        made: the option, whose text may be read and whose tuple may be given as a mapping.
    """
    text = str if made is not None and made.parse and made.type is not str else None
    kinds = [_accepted(one, text) for one in _alternatives(hint) if one is not type(None)]
    if made is not None and text is not None and not made.multiple:
        kinds += [text, float] if made.reads_numbers else [text]
    if type(None) in _alternatives(hint):
        kinds.append(type(None))
    found: Any = functools.reduce(lambda a, b: a | b, kinds)
    return found


def _accepted(hint: Any, text: Any) -> Any:
    if hint is Path:
        return str | os.PathLike[str]
    if typing.get_origin(hint) is not tuple or typing.get_args(hint)[-1] is not Ellipsis:
        return hint
    item = typing.get_args(hint)[0]
    item = _accepted(item, None) if item is Path else item
    sequences: Any = Sequence
    mappings: Any = Mapping
    many = sequences[item if text is None else item | text]
    is_pair = typing.get_origin(item) is tuple and len(typing.get_args(item)) == 2
    return many | mappings[typing.get_args(item)] if is_pair else many
