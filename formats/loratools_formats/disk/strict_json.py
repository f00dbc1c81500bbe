"""JSON parsing for files from strangers: what two parsers could read differently is refused.

Python's parser takes duplicate keys (last wins), NaN, huge integers and deep nesting. Each is
either ambiguous between readers or a way to hang one, so all are errors here.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile, read_small_file
from loratools_formats.disk.first_bytes import refuse_other_file

MAX_INTEGER_DIGITS = 20
MOST_VALUES = 1_000_000
_MARKS = (b"{", b"[", b",")
_LONG_INTEGER = re.compile(rf"[0-9]{{{MAX_INTEGER_DIGITS}}}")
_AS_ZEROS, _ZEROS = bytes.maketrans(b"123456789", b"0" * 9), b"0" * MAX_INTEGER_DIGITS
# But not that of "v1-0"; what is looked for comes first, so that the engine can skip to it.
_NEGATIVE_ZERO = re.compile(r"-0(?<![^\s:,\[]-0)(?![.0-9eE])")


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
    if text == "-0":  # a float to parsers that know unsigned integers, such as that of safetensors
        raise StrictJsonError("-0 is no integer")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise StrictJsonError("a number is too large for float64")
    return value


def _constant(text: str) -> float:
    raise StrictJsonError(f"{text} is not JSON")


def loads(
    data: bytes,
    *,
    max_depth: int | None = None,
    most_values: int = MOST_VALUES,
    with_surrogates: bool = False,
) -> Any:
    """Parse UTF-8 JSON.

    Args:
        data: the text.
        max_depth: most levels of lists and objects; by default what Python's parser can hold,
            for values that are neither written nor printed again.
        most_values: about how many values there may be.
        with_surrogates: take lone ones, which stand for bytes of file names that are no UTF-8.

    Raises:
        StrictJsonError: not UTF-8, a byte order mark, duplicate keys at any level, NaN or
            Infinity, integers over 20 digits, too many values, nesting too deep, lone
            surrogates, or no JSON.
    """
    # A value takes a comma or a bracket, and up to a hundred times its bytes once it is parsed.
    if len(data) > most_values and sum(map(data.count, _MARKS)) > most_values:
        raise StrictJsonError(f"more than {most_values} values")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 at byte {error.start}") from error
    if text.startswith("\ufeff"):
        raise StrictJsonError("starts with a byte order mark")
    # Python's own way to read integers is much faster than a function that counts their digits.
    # Looking for twenty zeros takes a tenth of the time of a pattern.
    is_odd = _ZEROS in data.translate(_AS_ZEROS) or _NEGATIVE_ZERO.search(text)
    integer = _integer if is_odd else None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=integer,
            parse_float=_number,
            parse_constant=_constant,
        )
    except RecursionError as error:
        raise StrictJsonError("nested too deeply") from error
    except json.JSONDecodeError as error:
        raise StrictJsonError(f"{error.msg} at character {error.pos}") from error
    if not with_surrogates and "\\ud" in text.lower():
        _refuse_surrogates(value)
    if max_depth is not None:
        _refuse_depth(value, max_depth)
    return value


def parsed_object(
    data: bytes,
    name: str,
    *,
    path: str | os.PathLike[str] | None = None,
    tensor: str | None = None,
    max_depth: int | None = None,
    most_values: int = MOST_VALUES,
) -> dict[str, Any]:
    """Parse a JSON object, or refuse it with an error for users.

    Args:
        data: UTF-8 text.
        name: what it is called in errors, such as `config`.
        path: the file that it stands in, for errors.
        tensor: the tensor that it stands in, for errors.
        max_depth: as in `loads`.
        most_values: as in `loads`.

    Raises:
        AdapterError: it is not sound JSON, or not an object.
    """
    try:
        values = loads(data, max_depth=max_depth, most_values=most_values)
    except StrictJsonError as error:
        text = f"{name} is not sound JSON: {error}"
        raise AdapterError(text, path=path, tensor=tensor) from error
    if not isinstance(values, dict):
        raise AdapterError(
            f"{name} is not a JSON object", path=path, tensor=tensor, got=type(values).__name__
        )
    return values


def read_object(
    given: str | os.PathLike[str] | RegularFile,
    limit_bytes: int,
    *,
    name: str = "config",
    max_depth: int | None = 64,
) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Args:
        given: a regular file, by its path or itself.
        limit_bytes: the largest that it may be.
        name: what it is called in errors.
        max_depth: as in `loads`.

    Raises:
        MissingFileError: it is not there.
        AdapterError: it is too large, another file than it is called, not sound JSON, or not an
            object.
    """
    path = given.path if isinstance(given, RegularFile) else given
    data = read_small_file(given, limit_bytes)
    refuse_other_file(data, len(data), path, is_text=True)
    return parsed_object(data, name, path=path, max_depth=max_depth)


def dumps(
    value: Any,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    separators: tuple[str, str] | None = None,
    ensure_ascii: bool = False,
) -> str:
    """Return a value as JSON that every parser reads, `loads` included; what files hold is this.

    Raises:
        AdapterError: a number is not finite, or a whole one has more than 20 digits.
    """
    try:
        text = json.dumps(
            value,
            indent=indent,
            sort_keys=sort_keys,
            separators=separators,
            ensure_ascii=ensure_ascii,
            allow_nan=False,
        )
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"a value cannot be written as JSON: {error}") from error
    if _LONG_INTEGER.search(text) is not None:
        _refuse_long_integers(value)
    return text


def _refuse_long_integers(value: Any) -> None:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
        elif isinstance(item, int) and abs(item) >= 10**MAX_INTEGER_DIGITS:
            raise AdapterError("a whole number is too large to be written as JSON", got=item)


def _refuse_depth(value: Any, max_depth: int) -> None:
    level = [value]
    for _ in range(max_depth + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise StrictJsonError("nested too deeply")


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
