"""A merge as a file: YAML with all its settings, so that it can be repeated byte for byte.

    version: 1
    method: ties
    parameters: {density: 0.3}
    adapters:
    - {path: ../chat, weight: 0.6, sha256: …}
    - {path: ../code, weight: 0.4, sha256: …}
    ranks: {rank: 16}
    overrides:
    - {match: mlp, weights: [0.3, 0.7]}

Paths are relative to the recipe's folder, or references to the Hub. A digest, if given, must be
that of the adapter's weights. Whatever is not known is an error that names its place in the file.
"""

from __future__ import annotations

import math
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from loratools.algebra.ranks import Budget, RankRule
from loratools.hub.references import Want, parse
from loratools.hub.resolve import located
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.methods import Method, get_method
from loratools.operations.merge.options import MergeOptions, Override
from loratools.work.declared import option
from loratools.work.regexes import check_regex
from loratools.work.selection import Dropping
from loratools_formats.disk import strict_yaml
from loratools_formats.disk.errors import AdapterError, OptionError
from loratools_formats.disk.files import read_small_file
from loratools_formats.disk.hub_cache import cached_place

VERSION = 1
_MAX_BYTES = 1 << 18
_MOST_ENTRIES = 10_000
SWITCHES = ("linear_differences", "force_base", "allow_missing")
NOT_IN_RECIPES = ("workers", "device")


@dataclass(frozen=True)
class RecipeFiles:
    """Where a merge's settings come from, and where they go.

    Attributes:
        recipe: take all settings from a file.
        save_recipe: also write all settings to this file.
    """

    recipe: Path | None = option(None, heading="Input", reference="file")
    save_recipe: Path | None = option(None, heading="Output")


@dataclass(frozen=True)
class RecipeAdapter:
    """An adapter of a recipe: where it is, its weight, and the digest of its weight file."""

    path: Path
    weight: float
    sha256: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Everything a merge needs."""

    adapters: tuple[RecipeAdapter, ...]
    options: MergeOptions
    base: Path | None = None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        MissingFileError: it is not there.
        AdapterError: not YAML, or something in it is not known or wrong; names its place.
    """
    try:
        content = strict_yaml.loads(read_small_file(path, _MAX_BYTES))
    except strict_yaml.StrictYamlError as error:
        raise AdapterError(f"not a recipe: {error}", path=path) from error
    try:
        return _recipe(content, path.parent)
    except OptionError as error:
        error.path = str(path)
        raise


def read_of(path: Path) -> list[Path]:
    """Return what a merge from a recipe reads: the recipe, its adapters and its base.

    Raises:
        LoratoolsError: the recipe cannot be read, or names on the Hub what cannot be resolved.
    """
    plan = with_local_paths(load_recipe(path), path.parent)
    return [path, *(each.path for each in plan.adapters), *([plan.base] if plan.base else [])]


def _fail(place: str, message: str, got: object = None, expected: object = None) -> OptionError:
    return OptionError(f"{place}: {message}", got=got, expected=expected)


def _fields(value: Any, place: str, known: Mapping[str, bool]) -> dict[str, Any]:
    """Return a map whose keys are all known and the required ones present."""
    if not isinstance(value, dict):
        raise _fail(place, "must be a map", got=type(value).__name__)
    for key in value:
        if key not in known:
            raise _fail(f"{place}.{key}", "unknown field", expected=", ".join(known))
    for key, required in known.items():
        if required and key not in value:
            raise _fail(f"{place}.{key}", "is missing")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise _fail(place, "must be a list", got=type(value).__name__)
    if len(value) > _MOST_ENTRIES:
        raise _fail(place, "is too long", got=len(value), expected=f"at most {_MOST_ENTRIES}")
    return value


def _number(value: Any, place: str) -> float:
    if type(value) in (int, float) and abs(value) < math.inf:
        try:
            return float(value)
        except OverflowError:
            pass
    raise _fail(place, "must be a finite number", got=value)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _fail(place, "must be a string", got=value)
    return value


def _placed(place: str, build: Callable[[], Any]) -> Any:
    """Run a check and put the place in front of what it complains about."""
    try:
        return build()
    except OptionError as error:
        error.message = f"{place}: {error.message}"
        raise


def _values(value: Any, place: str, of: type, names: Sequence[str]) -> dict[str, Any]:
    """Return a map of some fields of a dataclass, whose values have the types that it declares."""
    hints = typing.get_type_hints(of)
    fields = _fields(value, place, dict.fromkeys(names, False))
    return {name: _value(item, f"{place}.{name}", hints[name]) for name, item in fields.items()}


def _value(value: Any, place: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) if NoneType in typing.get_args(hint) else (hint,)
    kind = kinds[0]
    if value is None and NoneType in kinds:
        return None
    if typing.get_origin(kind) is typing.Literal:
        if value not in typing.get_args(kind):
            expected = " or ".join(map(str, typing.get_args(kind)))
            raise _fail(place, "is wrong", got=value, expected=expected)
    elif kind is float:
        return _number(value, place)
    elif kind in (int, bool) and type(value) is not kind:
        expected = "a whole number" if kind is int else "true or false"
        raise _fail(place, "is wrong", got=value, expected=expected)
    return value


def _recipe(content: Any, folder: Path) -> Recipe:
    fields = _fields(
        content,
        "$",
        {
            "version": True,
            "method": True,
            "adapters": True,
            "parameters": False,
            "space": False,
            "ranks": False,
            "compute": False,
            "overrides": False,
            "replacements": False,
            "drop": False,
            "keep": False,
            "base": False,
            "linear_differences": False,
            "force_base": False,
            "allow_missing": False,
        },
    )
    if type(fields["version"]) is not int or fields["version"] != VERSION:
        raise _fail("$.version", "is not supported", got=fields["version"], expected=VERSION)
    adapters = [
        _adapter(item, f"$.adapters[{index}]", folder)
        for index, item in enumerate(_list(fields["adapters"], "$.adapters"))
    ]
    if not adapters:
        raise _fail("$.adapters", "is empty")
    space = fields.get("space", "full")
    if space not in ("full", "core"):
        raise _fail("$.space", "is wrong", got=space, expected="full or core")
    switches = {name: _switch(fields, name) for name in SWITCHES}
    name = _text(fields["method"], "$.method")
    method: Method = _placed("$.method", lambda: get_method(name))
    base = fields.get("base")
    policy = fields.get("replacements")
    options = MergeOptions(
        method=name,
        parameters=_parameters(fields.get("parameters", {}), "$.parameters", method),
        rule=_rule(fields.get("ranks", {}), "$.ranks"),
        compute=_compute(fields.get("compute", {}), "$.compute"),
        space=space,
        overrides=tuple(
            _override(item, f"$.overrides[{index}]", method, len(adapters))
            for index, item in enumerate(_list(fields.get("overrides", []), "$.overrides"))
        ),
        replacements=None if policy is None else _text(policy, "$.replacements"),
        dropping=Dropping(
            **{key: _regex(fields[key], f"$.{key}") for key in ("drop", "keep") if key in fields}
        ),
        **switches,
    )
    return Recipe(
        tuple(adapters),
        options,
        None if base is None else _place(folder, _text(base, "$.base")),
    )


def _place(folder: Path, text: str) -> Path:
    """Return where a recipe's adapter or base is: beside the recipe, or on the Hub."""
    here = folder / text
    is_reference = not os.path.lexists(here) and parse(text, "adapter") is not None
    return Path(text) if is_reference else here


def with_local_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe with what it names on the Hub brought here.

    Args:
        recipe: as it was read.
        folder: where it was read; that of a cached one may lack what lies beside it on the Hub.

    Raises:
        LoratoolsError: a reference cannot be resolved.
    """
    adapters = tuple(
        replace(each, path=_local(each.path, "adapter", folder)) for each in recipe.adapters
    )
    base = None if recipe.base is None else _local(recipe.base, "model", folder)
    return replace(recipe, adapters=adapters, base=base)


def _local(path: Path, want: Want, folder: Path) -> Path:
    if os.path.lexists(path):
        return path
    place = cached_place(os.path.normpath(path))
    if place is not None:
        text = place.reference
    else:
        text = path.name if path.parent == folder else os.fspath(path)
    return located(text, want, beside="all" if want == "adapter" else "nothing") or path


def _switch(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise _fail(f"$.{name}", "must be true or false", got=value)
    return value


def _adapter(value: Any, place: str, folder: Path) -> RecipeAdapter:
    fields = _fields(value, place, {"path": True, "weight": False, "sha256": False})
    digest = fields.get("sha256")
    return RecipeAdapter(
        _place(folder, _text(fields["path"], f"{place}.path")),
        _number(fields.get("weight", 1.0), f"{place}.weight"),
        None if digest is None else _text(digest, f"{place}.sha256"),
    )


def _parameters(value: Any, place: str, method: Method) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _fail(place, "must be a map from names to values", got=type(value).__name__)
    result: dict[str, Any] = {}
    for name, item in value.items():
        result |= _placed(f"{place}.{name}", partial(method.checked, {name: item}))
    return result


def _rule(value: Any, place: str) -> RankRule:
    fields = _values(value, place, RankRule, list(RankRule.__dataclass_fields__))
    if "budget" in fields:
        text = str(fields["budget"])
        fields["budget"] = _placed(f"{place}.budget", lambda: Budget.parse(text))
    if "patterns" in fields:
        fields["patterns"] = tuple(
            _pattern(item, f"{place}.patterns[{index}]")
            for index, item in enumerate(_list(fields["patterns"], f"{place}.patterns"))
        )
    rule: RankRule = _placed(place, lambda: RankRule(**fields))
    return rule


def _pattern(value: Any, place: str) -> tuple[str, int]:
    pair = _list(value, place)
    if len(pair) != 2 or not isinstance(pair[0], str) or type(pair[1]) is not int:
        raise _fail(place, "must be a regular expression and a rank", got=value)
    _placed(place, lambda: check_regex(pair[0]))
    return pair[0], pair[1]


def _regex(value: Any, place: str) -> str:
    text = _text(value, place)
    _placed(place, lambda: check_regex(text))
    return text


def _compute(value: Any, place: str) -> ComputeOptions:
    names = [n for n in ComputeOptions.__dataclass_fields__ if n not in NOT_IN_RECIPES]
    fields = _values(value, place, ComputeOptions, names)
    options: ComputeOptions = _placed(place, lambda: ComputeOptions(**fields))
    return options


def _override(value: Any, place: str, method: Method, count: int) -> Override:
    fields = _fields(value, place, {"match": True, "weights": False, "parameters": False})
    weights = fields.get("weights")
    numbers = None
    if weights is not None:
        numbers = tuple(
            _number(item, f"{place}.weights[{index}]")
            for index, item in enumerate(_list(weights, f"{place}.weights"))
        )
        if len(numbers) not in (1, count):
            expected = f"1 or {count}"
            raise _fail(f"{place}.weights", "wrong number", got=len(numbers), expected=expected)
    parameters = _parameters(fields.get("parameters", {}), f"{place}.parameters", method)
    match = _text(fields["match"], f"{place}.match")
    override: Override = _placed(f"{place}.match", lambda: Override(match, numbers, parameters))
    return override
