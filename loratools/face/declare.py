"""Functions whose options are the fields of dataclasses, so that no option is spelled twice.

A keyword-only parameter that has no default, and whose type is a dataclass, stands for the options
that the class declares: callers give them by name, the function gets the instance.

References to the Hub end here, too: the function gets local paths, and its callers a `revision`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from loratools.face.ran import Asked, asked_of, is_place
from loratools.face.result import Result
from loratools.hub.references import (
    REVISION_HELP,
    Beside,
    Wanted,
    is_explicit,
    is_local,
    mapped,
    parse,
    with_revision,
)
from loratools.work.call import call_of, running
from loratools.work.declared import Option, build, declared
from loratools.work.requests import Writing
from loratools.work.typed import accepted, converted, hints, option_value
from loratools_formats.contract.path_kinds import missing
from loratools_formats.disk.errors import LoratoolsError
from loratools_formats.disk.parents import parents_made

R = TypeVar("R")


@dataclass(frozen=True)
class Declaration:
    """What a public function takes.

    Attributes:
        name: its name.
        inputs: types of its parameters that are no options: what it reads.
        required: those that have no default.
        options: its options by keyword, each with the dataclass that declares it.
        references: what its inputs want of references to the Hub.
        writes: whether it can write an output.
    """

    name: str
    inputs: Mapping[str, Any]
    required: frozenset[str]
    options: Mapping[str, tuple[type, Option]]
    references: Mapping[str, Wanted]
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
    wanted = _wanted(function)
    signature = _signature(inner, types, groups, takes_references=bool(wanted))
    inputs = {n: types[n] for n in inner if n not in groups and n != "progress"}
    places = frozenset({*wanted, *(name for name, hint in inputs.items() if is_place(hint))})

    def _is_whole(name: str, kwargs: Mapping[str, Any]) -> bool:
        return isinstance(kwargs.get(name), types[name])

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> R:
        whole = {name: kwargs.pop(name) for name in groups if _is_whole(name, kwargs)}
        _check_names(function.__name__, signature, args, kwargs)
        values = signature.bind(*args, **kwargs).arguments
        _revise(values, wanted)
        arguments = {n: values[n] for n in inner if n in values and n in inputs}
        _fetch(values, wanted, companions="output" in signature.parameters)
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
        asked = asked_of(arguments, (given[name] for name in groups), places)
        given |= {name: _fetched(given[name], own, given) for name, own in groups.items()}
        return _recorded(lambda: _called(function, given, groups), asked)

    call.declaration = Declaration(  # type: ignore[attr-defined]
        function.__name__,
        inputs,
        frozenset(n for n, p in inner.items() if n not in groups and p.default is p.empty),
        {word: (types[n], made) for n, group in groups.items() for word, made in group.items()},
        wanted,
        any(types[name] is Writing and "output" in group for name, group in groups.items()),
    )
    call.__signature__ = signature  # type: ignore[attr-defined]
    text = inspect.cleandoc(function.__doc__ or "")
    call.__doc__ = _documented(text, groups, takes_references=bool(wanted))
    return call


def _wanted(function: Callable[..., Any]) -> dict[str, Wanted]:
    """Return what the parameters that take references want of them."""
    found: dict[str, Wanted] = {}
    for name, hint in get_type_hints(function, include_extras=True).items():
        for part in (hint, *get_args(hint)):
            marks = [mark for mark in getattr(part, "__metadata__", ()) if isinstance(mark, Wanted)]
            found |= dict.fromkeys([name] if marks and name != "return" else [], *marks[:1])
    return found


def _revise(values: dict[str, Any], wanted: Mapping[str, Wanted]) -> None:
    """Take `revision` out of the arguments, and put it to the one reference among them.

    Raises:
        LoratoolsError: it fits none or several.
    """
    revision = values.pop("revision", None)
    if revision is not None:
        first = next((name for name in wanted if name in values), next(iter(wanted)))
        given = values.setdefault(first, None)
        values[first] = with_revision(given, revision, _want(wanted[first], given))


def _fetch(values: dict[str, Any], wanted: Mapping[str, Wanted], *, companions: bool) -> None:
    """Replace references among arguments by the local paths that stand for them.

    Args:
        values: the arguments.
        wanted: which of them take references.
        companions: whether what is kept beside adapters is wanted.

    Raises:
        LoratoolsError: a reference cannot be resolved.
    """
    for name, mark in wanted.items():
        if name in values and not mark.late:
            want = _want(mark, values[name])
            beside: Beside = "all" if companions and want == "adapter" else mark.beside
            local = functools.partial(_local, want=want, beside=beside, headers=mark.headers)
            values[name] = mapped(values[name], local)


def _recorded(run: Callable[[], R], asked: Asked) -> R:
    """Run a function; its result, or its error, then says what was asked for."""
    began = time.perf_counter()
    try:
        result = run()
    except LoratoolsError as error:
        found = getattr(error, "result", None)
        if isinstance(found, Result):
            found.record(asked, time.perf_counter() - began, failed=True)
        error.ran = replace(asked.ran, output=asked.output)
        raise
    if isinstance(result, Result):
        result.record(asked, time.perf_counter() - began)
    return result


def _called(
    function: Callable[..., R], given: dict[str, Any], groups: Mapping[str, Mapping[str, Option]]
) -> R:
    """Call a function, record the call in its output, and publish an output on the Hub."""
    place = getattr(given.get("writing"), "output", None)
    if place is not None and is_explicit(place):
        from loratools.face.staging import published

        writing = given["writing"]
        made: R = published(
            place,
            given,
            dry_run=writing.dry_run,
            run=lambda local: _called(
                function, {**given, "writing": replace(writing, output=local)}, groups
            ),
        )
        return made
    arguments = {n: v for n, v in given.items() if n not in groups and n != "progress"}
    this = call_of(function.__name__, arguments, [given[name] for name in groups])
    outputs = [g.output for g in given.values() if isinstance(g, Writing)]
    with running(this), parents_made(next(iter(outputs), None)):
        return function(**given)


def _want(mark: Wanted, value: Any) -> Any:
    is_text = isinstance(value, str | os.PathLike)
    return mark.text if mark.text is not None and is_text else mark.want


def _fetched(group: Any, options: Mapping[str, Option], given: Mapping[str, Any]) -> Any:
    """Return a dataclass of options with local paths in place of references.

    A field may be an argument of this function instead of an option, as the base model of a command
    line's `Reading` is. It then gets the fetched value of the argument.
    """
    places: dict[str, Any] = {}
    for made in declared(type(group)):
        path = getattr(group, made.field) if made.reference is not None else None
        if path is None:
            continue
        if made.keyword in options:
            places[made.field] = _local(path, want=made.reference, beside="nothing")
        else:
            other = given.get(made.field)
            places[made.field] = other if isinstance(other, Path) else None
    return replace(group, **places) if places else group


def _local(path: Any, *, want: Any, beside: Beside, headers: bool = False) -> Any:
    if not os.fspath(path):
        return path
    if want == "model" and is_local(path) and not os.path.lexists(path):
        # A `Path` made of it would lose the `./` which says that it is no name on the Hub.
        raise missing(path)
    if parse(path, want) is None:
        return path
    from loratools.hub.resolve import located

    found = located(path, want, beside=beside, headers=headers)
    return path if found is None else found


def _signature(
    inner: Mapping[str, Parameter],
    types: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Option]],
    *,
    takes_references: bool,
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
    if takes_references:
        kind = Parameter.KEYWORD_ONLY
        outer["revision"] = Parameter("revision", kind, default=None, annotation=str | None)
    ordered = sorted(outer.values(), key=lambda p: (p.kind, p.name == "progress"))
    return Signature(ordered, return_annotation=types["return"])


def _documented(
    docstring: str, groups: Mapping[str, Mapping[str, Option]], *, takes_references: bool
) -> str:
    """Return a docstring that lists the options before its `Raises:`."""
    options = {word: made.help for group in groups.values() for word, made in group.items()}
    if takes_references:
        options["revision"] = REVISION_HELP
    if not options:
        return docstring
    lines = [f"    {word}: {text}" for word, text in options.items()]
    head, raises, tail = docstring.partition("\nRaises:\n")
    return "\n".join([f"{head.rstrip()}\n", "Options:", *lines, raises + tail])


_PAIRS = "weights go with their adapters: {adapter: weight} or [(adapter, weight)]"


def _likely(value: Any, signature: Signature) -> str:
    """Return how to name a value that was given by position, as far as it can be told."""
    parameters = signature.parameters
    options = [name for name, p in parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    if "adapters" in parameters and isinstance(value, list | tuple | float):
        return _PAIRS
    required = [name for name in options if parameters[name].default is Parameter.empty]
    likely = [*required, "rank" if isinstance(value, int) else "output", *options]
    example = next((name for name in likely if name in options), "name")
    return f"name the options, such as {example}={value!r}"


def _check_names(
    name: str, signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Refuse what Python would refuse, with the next step in the message."""
    parameters = signature.parameters.values()
    positional = [p.name for p in parameters if p.kind is not Parameter.KEYWORD_ONLY]
    if len(args) > len(positional):
        raise TypeError(
            f"{name}() takes {' and '.join(positional) or 'nothing'} by position; "
            + _likely(args[len(positional)], signature)
        )
    for given in kwargs:
        if given not in signature.parameters:
            close = difflib.get_close_matches(given, signature.parameters, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            if given in ("weight", "weights") and "adapters" in signature.parameters:
                hint = f"; {_PAIRS}"
            raise TypeError(f"{name}() has no option {given!r}{hint}")
