"""The schema of recipes, made from what public functions declare: no option is listed here.

A step is a map with `name`, `do` (the operation) and the operation's inputs and options. msgspec
checks types, names and choices of the whole file, and makes the JSON Schema from the same types.
"""

from __future__ import annotations

import operator
import os
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from loratools.face.declare import Declaration
from loratools.pipeline.functions import step_functions, writing_functions
from loratools.work.declared import Option
from loratools.work.typed import hints

VERSION = 1
NAME = r"[A-Za-z][A-Za-z0-9_-]{0,63}"
_OUTPUT = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}"

# Recipes say where results go, and whoever runs them with how many threads and over what.
_NOT_IN_STEPS = frozenset({"output", "overwrite", "in_place", "dry_run", "workers", "fix"})

Scalar = str | int | float | bool | None


class WeightedPath(msgspec.Struct, forbid_unknown_fields=True):
    """An adapter with its weight."""

    path: str
    weight: float = 1.0


@cache
def step_types() -> dict[str, tuple[type, Declaration]]:
    """Return the types of steps with the function that each calls, by the operation's name."""
    found: dict[str, tuple[type, Declaration]] = {}
    for name, (_, declaration) in step_functions().items():
        word = name.replace("_", "-")
        made = msgspec.defstruct(
            word,
            _fields(declaration, writes=name in writing_functions()),
            tag=word,
            tag_field="do",
            forbid_unknown_fields=True,
            kw_only=True,
        )
        found[word] = (made, declaration)
    return found


@cache
def recipe_type() -> Any:
    """Return the type of a whole recipe."""
    steps = reduce(operator.or_, (made for made, _ in step_types().values()))
    return msgspec.defstruct(
        "recipe",
        [
            ("version", Literal[1]),
            ("steps", Annotated[list[steps], msgspec.Meta(min_length=1)]),  # type: ignore[valid-type]
            ("variables", dict[str, Scalar], msgspec.field(default_factory=dict)),
        ],
        forbid_unknown_fields=True,
        kw_only=True,
    )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **msgspec.json.schema(recipe_type()),
        "title": "a recipe of loratools run",
    }


def option_name(word: str) -> str:
    """Return the key that a recipe has for a keyword of Python: `lambda` for `lambda_`."""
    return word.rstrip("_")


def step_options(declaration: Declaration) -> dict[str, tuple[str, type, Option]]:
    """Return the options of a step by their key: the keyword, the dataclass, the declaration."""
    return {
        option_name(word): (word, cls, made)
        for word, (cls, made) in declaration.options.items()
        if word not in _NOT_IN_STEPS
    }


def _fields(declaration: Declaration, *, writes: bool) -> list[Any]:
    unset = msgspec.UnsetType
    fields: list[Any] = [("name", Annotated[str, msgspec.Meta(pattern=f"^{NAME}$")])]
    for name, hint in declaration.inputs.items():
        shape = input_shape(hint)
        if name in declaration.required:
            fields.append((name, shape))
        else:
            fields.append((name, shape | None | unset, msgspec.UNSET))
    for key, (_, cls, made) in step_options(declaration).items():
        shape = _described(option_shape(hints(cls)[made.field], made), made.help)
        fields.append((key, shape, msgspec.UNSET))
    if writes:
        output = Annotated[str, msgspec.Meta(pattern=f"^{_OUTPUT}$")]
        text = "Name of the result in the folder of results; by default that of the step."
        fields.append(("output", _described(output, text), msgspec.UNSET))
    return fields


def _described(shape: Any, text: str) -> Any:
    return Annotated[shape | None, msgspec.Meta(description=text)] | msgspec.UnsetType


def input_shape(hint: Any) -> Any:
    """Return what a recipe may say for a parameter that is no option."""
    kinds = _alternatives(hint)
    origins = {typing.get_origin(kind) for kind in kinds}
    if Mapping in origins:
        return str | list[str | WeightedPath] | dict[str, float]
    return str | list[str] if Sequence in origins else str


def is_path(hint: Any) -> bool:
    """Whether a parameter that is no option names files; else it is plain text."""
    return any(
        kind is Path or typing.get_origin(kind) is os.PathLike or kind is os.PathLike
        for kind in _alternatives(hint)
    )


def option_shape(hint: Any, made: Option) -> Any:
    """Return what a recipe may say for an option."""
    shapes: list[Any] = []
    for kind in _alternatives(hint):
        if kind is types.NoneType:
            continue
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            pair = typing.get_args(item) if typing.get_origin(item) is tuple else ()
            each: Any = str if pair else _one(item, made)
            shapes += [str, list[each]]
            if len(pair) == 2:
                value: Any = _plain(pair[1])
                shapes.append(dict[str, value])
        else:
            shapes.append(_one(kind, made))
    return reduce(operator.or_, shapes)


def _one(kind: Any, made: Option) -> Any:
    plain = _plain(kind)
    if plain is Any:  # of a class of ours, which text is read for, or its fields
        return str | int | dict[str, Any]
    is_read = made.parse is not None and plain in (int, float)
    return plain | str if is_read else plain


def _plain(kind: Any) -> Any:
    if kind is Path:
        return str
    if kind in (bool, int, float, str) or typing.get_origin(kind) is Literal:
        return kind
    return Any


def _alternatives(hint: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)
