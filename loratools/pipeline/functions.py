"""Public functions that may be run by name: those that write, found by what they declare."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from loratools.face.declare import Declaration, declaration_of
from loratools_formats.disk.errors import AdapterError

Function = Callable[..., Any]

_NOT_AGAIN = ("fleet_index",)
"""Functions whose outputs name paths, so that another folder gives other bytes."""
_OTHERS = ("check", "push")
"""Functions of a recipe that make no file on this machine, or make one on another."""


@cache
def writing_functions() -> dict[str, tuple[Function, Declaration]]:
    """Return the functions whose result is a file or folder, by name."""
    return {
        name: (function, declaration)
        for name, (function, declaration) in _declared().items()
        if declaration.writes and declaration.inputs and name not in (*_OTHERS, *_NOT_AGAIN)
    }


@cache
def step_functions() -> dict[str, tuple[Function, Declaration]]:
    """Return the functions that may be a step of a recipe, by name."""
    others = {name: found for name, found in _declared().items() if name in _OTHERS}
    return {**writing_functions(), **others}


@cache
def _declared() -> dict[str, tuple[Function, Declaration]]:
    package = import_module("loratools")
    functions = {name: getattr(package, name) for name in dir(package) if not name.startswith("_")}
    return {
        name: (function, declaration_of(function))
        for name, function in sorted(functions.items())
        if isinstance(getattr(function, "declaration", None), Declaration)
    }


def writing_function(name: str) -> tuple[Function, Declaration]:
    """Return one of the functions whose result is a file or folder.

    Raises:
        AdapterError: there is none of that name.
    """
    functions = writing_functions()
    if name not in functions:
        raise AdapterError(
            "no operation of that name writes an output", got=name, expected=", ".join(functions)
        )
    return functions[name]
