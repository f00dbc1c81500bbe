"""The call of a public function that is running, as a record of its output keeps it.

Every option has one declaration, so one place can say what was asked for: the decorator of public
functions, which sets the call here. What an operation writes says how it was made from that, and
no operation hands it through. Options that leave the bytes alone (threads, where the output goes)
are no part of a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from loratools.work.declared import declared
from loratools.work.requests import Reporting, Writing

Result = TypeVar("Result")

_WITHOUT_EFFECT = frozenset({"workers", "cache", "shard", "scheduler"})
_TABLE = ("names", ".toml")
"""The option that takes a name or a file, and how the two are distinguished."""


@dataclass(frozen=True)
class Call:
    """A call of a public function.

    Attributes:
        function: its name in Python, such as `to_lora`.
        arguments: what it reads, by parameter: paths, adapters, checkpoints, or lists of
            (adapter, weight).
        options: the options that are not at their default, in the types of JSON.
        seed: of what is random; None if the function takes none.
    """

    function: str
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    seed: int | None = None


_RUNNING: ContextVar[Call | None] = ContextVar("loratools_call", default=None)


def running_call() -> Call | None:
    """Return the innermost call that is running; None outside of public functions."""
    return _RUNNING.get()


@contextlib.contextmanager
def running(call: Call | None) -> Iterator[None]:
    """Let operations record this call while the context lasts."""
    token = _RUNNING.set(call)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def kept(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function that runs within the present call, in whatever thread and whenever."""
    call = running_call()

    def within(*args: Any, **kwargs: Any) -> Result:
        with running(call):
            return function(*args, **kwargs)

    return within


def call_of(function: str, arguments: Mapping[str, Any], groups: Sequence[Any]) -> Call:
    """Return the call of a function.

    Args:
        function: its name.
        arguments: its parameters that are no options, by name.
        groups: instances of the dataclasses that declare its options.
    """
    options: dict[str, Any] = {}
    paths = {name: value for name, value in arguments.items() if value is not None}
    seed: int | None = None
    for group in groups:
        if isinstance(group, Writing | Reporting):
            continue
        for made in declared(type(group)):
            value = getattr(group, made.field)
            seed = value if made.name == "seed" else seed
            if made.name in _WITHOUT_EFFECT or value == made.default or value is None:
                continue
            if isinstance(value, Path) or _is_table(made.name, value):
                paths[made.keyword] = value
            elif value != ():
                options[made.keyword] = as_value(value)
    return Call(function, paths, options, seed)


def _is_table(name: str, value: Any) -> bool:
    return name == _TABLE[0] and str(value).endswith(_TABLE[1])


def as_value(value: Any) -> Any:
    """Return the value of an option in the types of JSON; options take it back in that form."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((one, getattr(value, one.name)) for one in dataclasses.fields(value))
        return {one.name: as_value(item) for one, item in fields if item not in (None, (), {})}
    if isinstance(value, Mapping):
        return {str(key): as_value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [as_value(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value
