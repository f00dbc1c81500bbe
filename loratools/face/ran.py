"""What every result says of the run that made it: version, inputs, output, options, seconds.

The decorator of public functions is the one place that knows all of it, so `to_dict()` in Python
and `--json` say the same of every command. Inputs are named as the caller named them, a reference
to the Hub included. `seconds` is the only value that differs between equal runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from loratools import __version__
from loratools.work.call import as_value
from loratools.work.declared import declared
from loratools_formats.core.adapter import Adapter

_WITHOUT_EFFECT = frozenset({"workers", "json", "quiet", "verbose"})
_OF_WRITING = frozenset({"output", "in_place", "overwrite", "dry_run"})


@dataclass(frozen=True, kw_only=True)
class Ran:
    """How a result came about.

    Attributes:
        version: of loratools.
        inputs: the paths or references that were read, as they were given; null for what was in
            memory and is of no file.
        output: where the result was to go; null if nowhere was named, as on a dry run.
        written: whether the output was written.
        seconds: how long it took; the one value that differs between equal runs.
        options: those that are not at their default, and the weights of inputs unless all are 1.
        notes: what a user should know, in sentences.
    """

    version: str = __version__
    inputs: tuple[str | None, ...] = ()
    output: str | None = None
    written: bool = False
    seconds: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is known of a run before it starts.

    Attributes:
        ran: inputs and options.
        output: where the result is to go; None if nowhere.
        dry_run: whether nothing is to be written.
    """

    ran: Ran
    output: str | None
    dry_run: bool


def asked_of(arguments: Mapping[str, Any], groups: Iterable[Any], places: frozenset[str]) -> Asked:
    """Return what a function was asked for.

    Args:
        arguments: what it is called with that is no option, by name, before references to the Hub
            become paths.
        groups: instances of the dataclasses that declare its options.
        places: the arguments that name something to read.
    """
    inputs = {name: value for name, value in arguments.items() if name in places}
    options = {
        name: as_value(value)
        for name, value in arguments.items()
        if name not in places and value is not None and not isinstance(value, Adapter)
    }
    writing: dict[str, Any] = {}
    for group in groups:
        for made in declared(type(group)):
            value = getattr(group, made.field)
            if made.field in _OF_WRITING:
                writing[made.field] = value
            elif made.field in _WITHOUT_EFFECT or value in (None, ()) or value == made.default:
                continue
            elif made.reference is not None:
                inputs[made.keyword] = value
            elif made.keyword not in arguments:
                options[made.keyword] = as_value(value)
    read = [pair for value in inputs.values() for pair in _read(value)]
    if any(weight != 1.0 for _, weight in read):
        options["weights"] = [weight for _, weight in read]
    names = tuple(name for name, _ in read)
    output = writing.get("output")
    if output is None and writing.get("in_place"):
        output = names[0]
    return Asked(
        ran=Ran(inputs=names, options=options),
        output=None if output is None else os.fspath(output),
        dry_run=bool(writing.get("dry_run")),
    )


def _read(value: Any) -> Iterator[tuple[str | None, float]]:
    """Yield the path and the weight of everything that an argument names."""
    if value is None:
        return
    if isinstance(value, str | os.PathLike):
        yield os.fspath(value), 1.0
    elif isinstance(value, Mapping):
        for one, weight in value.items():
            if isinstance(weight, int | float):
                yield from _weighted(one, weight)
            else:
                yield from _read(weight)  # adapters by the names that they get
    elif isinstance(value, tuple | list):
        for one in value:
            if isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], int | float):
                yield from _weighted(*one)
            else:
                yield from _read(one)
    else:
        source = getattr(value, "source", None) or getattr(value, "path", None)
        yield None if source is None else str(source), 1.0


def _weighted(one: Any, weight: Any) -> Iterator[tuple[str | None, float]]:
    for name, _ in _read(one):
        yield name, float(weight)


def is_place(hint: Any) -> bool:
    """Return whether values of a type name something to read."""
    if hint is Path or get_origin(hint) is os.PathLike or hint is os.PathLike:
        return True
    return any(is_place(part) for part in get_args(hint))
