"""The form of a table of names, held against a parsed file: every key, and every value's type.

What the values mean together, such as parts that rows stand for, is for `tables` to check.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratools_formats.core.single_file_keys import COMPONENTS
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True)
class _Value:
    """What a key may hold."""

    expected: str
    fits: Callable[[Any], bool]
    required: bool = False


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_pairs(value: Any) -> bool:
    return isinstance(value, list) and all(_is_texts(each) and len(each) > 1 for each in value)


def _is_lists(value: Any) -> bool:
    return isinstance(value, list) and all(_is_texts(each) for each in value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each > 0 for each in value)


def _is_groups(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def _is_counts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_counts, value.values()))


def _is_expressions(value: Any) -> bool:
    return _is_texts(value) and all(map(_compiles, value))


def _compiles(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


_TEXT = _Value("a text", lambda value: isinstance(value, str))
_NAME = _Value("a text", lambda value: isinstance(value, str), required=True)
_COMPONENTS = ", ".join(COMPONENTS)
_TABLE = {
    "title": _NAME,
    "diffusers": _Value(f"one of {_COMPONENTS}", lambda value: value in COMPONENTS, required=True),
    "kohya": _Value(
        "original, trained or diffusers",
        lambda value: value in ("original", "trained", "diffusers"),
        required=True,
    ),
    "experts": _Value(
        f"a list of {_COMPONENTS}", lambda value: _is_texts(value) and set(value) <= {*COMPONENTS}
    ),
    "unmixed": _Value("true or false", lambda value: isinstance(value, bool)),
    "classes": _Value("a list of texts", _is_texts),
    "known_as": _Value("a list of regular expressions", _is_expressions),
    "blocks": _Value("a list of numbers above 0 for each name", _is_counts_by_name),
    "text_encoders": _Value("a table", lambda value: isinstance(value, dict)),
    "modules": _Value(
        "[[modules]], one or more",
        lambda value: _is_groups(value) and len(value) > 0,
        required=True,
    ),
    "aliases": _Value("[[aliases]]", _is_groups),
}
_PAIRS = {
    "pairs": _Value("a list of lists of names, two or more", _is_pairs, required=True),
    "rows": _Value("a list of numbers above 0", _is_counts),
    "original": _TEXT,
}
_MODULES = _PAIRS | {
    "diffusers": _TEXT,
    "blocks": _Value(
        "a list of pairs of names",
        lambda value: _is_pairs(value) and all(len(each) == 2 for each in value),
    ),
    "shape": _Value(
        "two numbers above 0, of rows and of columns",
        lambda value: _is_counts(value) and len(value) == 2,
    ),
    "kernel": _Value("a list of numbers above 0", _is_counts),
    "component": _Value(f"one of {_COMPONENTS}", lambda value: value in COMPONENTS),
    "trained": _Value("a list of lists of names, one for each of the pairs", _is_lists),
    "swapped_halves": _Value("true or false", lambda value: isinstance(value, bool)),
}
_ALIASES = _PAIRS | {"alias": _NAME}


def check_form(values: Mapping[str, Any], paths: Collection[str], path: str | None) -> None:
    """Refuse a value that is no table of names.

    Args:
        values: the parsed file.
        paths: names of the lists of modules that text encoders may have.
        path: the file, for messages.

    Raises:
        OptionError: a key is missing or unknown, or its value is of another form.
    """
    _check(values, _TABLE, "", path)
    for index, group in enumerate(values["modules"]):
        _check(group, _MODULES, f"modules[{index}].", path)
    for index, group in enumerate(values.get("aliases", ())):
        _check(group, _ALIASES, f"aliases[{index}].", path)
    encoder = {
        "kohya": _NAME,
        "comfyui": _NAME,
        "paths": _Value(
            f"one of {', '.join(sorted(paths))}",
            lambda value: isinstance(value, str) and value in paths,
            required=True,
        ),
        "also": _Value("a list of texts", _is_texts),
        "outer": _TEXT,
    }
    for role, entry in values.get("text_encoders", {}).items():
        if not isinstance(entry, dict):
            raise _wrong(f"text_encoders.{role}", entry, "a table", path)
        _check(entry, encoder, f"text_encoders.{role}.", path)


def _check(
    values: Mapping[str, Any], form: Mapping[str, _Value], where: str, path: str | None
) -> None:
    for key, value in values.items():
        if key not in form:
            raise OptionError(
                "a table of names has no such key",
                path=path,
                got=where + key,
                expected=", ".join(form),
            )
        if not form[key].fits(value):
            raise _wrong(where + key, value, form[key].expected, path)
    for key, wanted in form.items():
        if wanted.required and key not in values:
            raise OptionError(
                f"the table of names lacks {where}{key}", path=path, expected=wanted.expected
            )


def _wrong(key: str, value: object, expected: str, path: str | None) -> OptionError:
    return OptionError(
        f"{key} is wrong in the table of names", path=path, got=repr(value), expected=expected
    )
