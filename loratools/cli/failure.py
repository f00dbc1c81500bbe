"""Errors as JSON objects: under `--json` stdout holds one object, whatever happened.

The object has what every result has (version, inputs, output, options, ...), and `error`. If a
function of the library raised the error, the error knows what was asked for. For an earlier error,
inputs and options are taken from the command line.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from loratools import __version__
from loratools.cli.wording import worded

_OF_WRITING = ("output", "in_place", "overwrite", "dry_run", "json", "quiet", "verbose", "workers")
_REPORTED = "loratools_reported"
_context: click.Context | None = None


def remember(context: click.Context | None) -> None:
    """Keep the context of the command that runs, for an error that it may end in."""
    global _context  # noqa: PLW0603 - a process runs one command; click drops its context on errors
    _context = context


def is_json(arguments: list[str]) -> bool:
    """Return whether a command line asks for JSON, right or wrong as the rest of it may be.

    >>> is_json(["info", "--json", "x"]), is_json(["check", "--output-format=json"])
    (True, True)
    >>> is_json(["info", "--", "--json"])
    False
    """
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    pairs = zip(before, [*before[1:], ""], strict=True)
    return any(
        one in ("--json", "--output-format=json") or (one, value) == ("--output-format", "json")
        for one, value in pairs
    )


def error_fields(error: BaseException, text: str, code: int) -> dict[str, Any]:
    """Return the object under `error`.

    Args:
        error: what was raised.
        text: the line for people.
        code: the exit code.
    """
    fields = ("message", "path", "tensor", "got", "expected", "hint")
    known = {name: getattr(error, name, None) for name in fields}
    known["message"] = known["message"] or text
    return {
        "kind": type(error).__name__.removeprefix("_"),
        "text": text,
        "exit_code": code,
        **{name: None if value is None else worded(str(value)) for name, value in known.items()},
    }


def mark_reported(error: BaseException) -> None:
    """Say that the object of an error was printed already, with what was found."""
    setattr(error, _REPORTED, True)


def is_reported(error: BaseException) -> bool:
    """Return whether the object of an error was printed already."""
    return getattr(error, _REPORTED, False)


def failure(error: BaseException, text: str, code: int, seconds: float = 0.0) -> dict[str, Any]:
    """Return the whole object for an error: with the result that it carries, if it carries one."""
    result: Any = getattr(error, "result", None)
    found = {"error": error_fields(error, text, code)}
    if hasattr(result, "to_dict"):
        return {**result.to_dict(), **found}
    ran = getattr(error, "ran", None)
    if ran is not None:
        from loratools.work.json_object import as_json

        asked = {**as_json(ran), "seconds": round(seconds, 3)}
    else:
        asked = {"version": __version__, **_typed(), "written": False}
        asked |= {"seconds": round(seconds, 3), "notes": []}
    return {"schema": 1, "operation": _operation(), **asked, **found}


def _operation() -> str | None:
    if _context is not None:
        return _context.info_name
    words = [one for one in sys.argv[1:] if not one.startswith("-")]
    return words[0] if words else None


def _typed() -> dict[str, Any]:
    """Return inputs, output and options as the command line has them."""
    empty: dict[str, Any] = {"inputs": [], "output": None, "options": {}}
    if _context is None:
        return empty
    values = dict(_context.params)
    inputs: list[str] = []
    output = values.get("output") or values.get("place")
    for parameter in _context.command.params:
        if isinstance(parameter, click.Argument) and parameter.name != "place":
            value = values.pop(parameter.name or "", None)
            several = value if isinstance(value, tuple) else () if value is None else (value,)
            inputs += [os.fspath(one) for one in several]
    options = {
        name: _plain(value)
        for name, value in values.items()
        if name not in (*_OF_WRITING, "place") and _is_typed(_context, name)
    }
    return {
        "inputs": inputs,
        "output": None if output is None else os.fspath(output),
        "options": options,
    }


def _is_typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)
