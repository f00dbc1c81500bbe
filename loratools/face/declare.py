"""Functions whose options are the fields of dataclasses, so that no option is spelled twice.

A keyword-only parameter that has no default, and whose type is a dataclass, stands for the options
that the class declares: callers give them by name, the function gets the instance.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from inspect import Parameter, Signature
from typing import Any, TypeVar

from loratools.work.call import call_of, running
from loratools.work.declared import Option, build, declared
from loratools.work.requests import Writing
from loratools.work.typed import accepted, converted, hints, option_value

R = TypeVar("R")

Progress = Callable[[int, int], None]
"""Called with (done, in all) while an operation runs."""


@dataclass(frozen=True)
class Declaration:
    """What a public function takes.

    Attributes:
        name: its name.
        inputs: types of its parameters that are no options: what it reads.
        required: those that have no default.
        options: its options by keyword, each with the dataclass that declares it.
        writes: whether it can write an output.
    """

    name: str
    inputs: Mapping[str, Any]
    required: frozenset[str]
    options: Mapping[str, tuple[type, Option]]
    writes: bool


def declaration_of(function: Any) -> Declaration:
    """Return what a public function takes."""
    found: Declaration = function.declaration
    return found


def public(**only: tuple[str, ...]) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Let a function take the options of its dataclass parameters as keywords of its own.

    What the function gets has the declared types: a path given as text is a `Path`. An instance is
    taken too, by the parameter's name: `rank=8` or `rule=RankRule(rank=8)`. The function raises
    `TypeError` for an argument that it does not have or one too many, and `OptionError` for a value
    of the wrong type.

    Args:
        only: for a dataclass parameter, the options to take; by default all that it declares.
    """
    return lambda function: _public(function, only)


def _public(function: Callable[..., R], only: Mapping[str, tuple[str, ...]]) -> Callable[..., R]:
    types = hints(function)
    inner = inspect.signature(function).parameters
    groups = {
        name: {made.keyword: made for made in declared(types[name], *only.get(name, ()))}
        for name, parameter in inner.items()
        if parameter.default is Parameter.empty and is_dataclass(types[name])
        if parameter.kind is Parameter.KEYWORD_ONLY
    }
    signature = _signature(inner, types, groups)

    def _is_whole(name: str, kwargs: Mapping[str, Any]) -> bool:
        return isinstance(kwargs.get(name), types[name])

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        whole = {name: kwargs.pop(name) for name in groups if _is_whole(name, kwargs)}
        _check_names(function.__name__, signature, args, kwargs)
        values = signature.bind(*args, **kwargs).arguments
        given = {
            name: converted(name, values[name], types[name])
            for name in inner
            if name in values and name not in groups
        }
        for name, options in groups.items():
            chosen = {
                made.name: option_value(types[name], made, values[word])
                for word, made in options.items()
                if word in values
            }
            if name not in whole:
                given[name] = build(types[name], chosen)
            elif chosen:
                raise TypeError(f"{function.__name__}() has {name} and {next(iter(chosen))}")
        given |= whole
        arguments = {n: v for n, v in given.items() if n not in groups and n != "progress"}
        this = call_of(function.__name__, arguments, [given[name] for name in groups])
        with running(this):
            return function(**given)

    call.declaration = Declaration(  # type: ignore[attr-defined]
        function.__name__,
        {n: types[n] for n in inner if n not in groups and n != "progress"},
        frozenset(n for n, p in inner.items() if n not in groups and p.default is p.empty),
        {word: (types[n], made) for n, group in groups.items() for word, made in group.items()},
        any(types[name] is Writing and "output" in group for name, group in groups.items()),
    )
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = _documented(inspect.cleandoc(function.__doc__ or ""), groups)
    return call


def _signature(
    inner: Mapping[str, Parameter],
    types: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Option]],
) -> Signature:
    outer: dict[str, Parameter] = {}
    for name, parameter in inner.items():
        if name not in groups:
            outer[name] = parameter.replace(annotation=accepted(types[name]))
            continue
        of = hints(types[name])
        for word, made in groups[name].items():
            outer.setdefault(
                word,
                Parameter(
                    word,
                    Parameter.KEYWORD_ONLY,
                    default=made.default,
                    annotation=accepted(of[made.field] | None, made)
                    if made.default is None
                    else accepted(of[made.field], made),
                ),
            )
    ordered = sorted(outer.values(), key=lambda p: (p.kind, p.name == "progress"))
    return Signature(ordered, return_annotation=types["return"])


def _documented(text: str, groups: Mapping[str, Mapping[str, Option]]) -> str:
    """Return a docstring that lists the options before its `Raises:`."""
    options = {word: made for group in groups.values() for word, made in group.items()}
    if not options:
        return text
    lines = [f"    {word}: {made.help}" for word, made in options.items()]
    head, raises, tail = text.partition("\nRaises:\n")
    return "\n".join([f"{head.rstrip()}\n", "Options:", *lines, raises + tail])


def _check_names(
    name: str, signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Refuse what Python would refuse, with the next step in the message."""
    parameters = signature.parameters.values()
    positional = [p.name for p in parameters if p.kind is not Parameter.KEYWORD_ONLY]
    options = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    if len(args) > len(positional):
        example = "rank" if "rank" in options else options[0]
        raise TypeError(
            f"{name}() takes {' and '.join(positional) or 'nothing'} by position; name the "
            f"options, such as {example}={args[len(positional)]!r}"
        )
    for given in kwargs:
        if given not in signature.parameters:
            close = difflib.get_close_matches(given, signature.parameters, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{name}() has no option {given!r}{hint}")
