"""The registry of merge methods: what a method is, and how one is found by name.

A method is one function with its parameters as keyword-only arguments, registered as an entry
point of the group `loratools.methods`, ours and third parties' alike. There are three classes,
which decide how a method is run and what it costs:

span         the result is Σ cₜ·ΔWₜ, and cₜ depends on inner products only: exact in factor space.
core         the result is computed in the space that all factors share, at cost O(d·R²).
elementwise  the result needs single entries of ΔW: streamed in blocks of rows, then truncated.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loratools.work.spellings import share
from loratools_formats.contract.plugins import Plugin, load_group
from loratools_formats.disk.errors import OptionError

GROUP = "loratools.methods"

Kind = Literal["span", "core", "elementwise"]


@dataclass(frozen=True)
class Method:
    """A way to merge weight changes.

    Attributes:
        name: what users type.
        kind: `span`, `core` or `elementwise`; decides the signature of `function`:
            span: (gram (T, T), weights (T,), *, parameters) → coefficients (T,);
            core: (space: SharedSpace, weights (T,), *, parameters) → (b, a);
            elementwise: (tasks: Tasks, weights (T,), *, parameters) → function of (start, stop)
            that returns those rows of the result.
        summary: one line.
        paper: where it is defined.
        function: the method itself; its keyword-only arguments are its parameters.
        least: smallest number of adapters.
        most: largest number of adapters, None if any.
        uncompressed: whether the result keeps the rank of the sum unless another is asked for.
        scales: whether the result is zero where every weight is; modules of such are left out.
    """

    name: str
    kind: Kind
    summary: str
    paper: str
    function: Callable[..., Any]
    least: int = 1
    most: int | None = None
    uncompressed: bool = False
    scales: bool = False

    @functools.cached_property
    def parameters(self) -> dict[str, Any]:
        """Parameter names and their default values."""
        signature = inspect.signature(self.function)
        return {
            name: parameter.default
            for name, parameter in signature.parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def checked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return given parameters under their names in Python, converted to their types.

        Raises:
            OptionError: a name the method does not have, or a value of the wrong type.
        """
        hints = typing.get_type_hints(self.function)
        result = {}
        for shown, value in given.items():
            name = shown if shown in self.parameters else f"{shown}_"
            if name not in self.parameters:
                known = [parameter.rstrip("_") for parameter in self.parameters]
                close = difflib.get_close_matches(shown, known, n=1)
                raise OptionError(
                    f"method {self.name} has no parameter {shown.rstrip('_')}",
                    expected=", ".join(known) or "none",
                    hint=f"Did you mean {close[0]}?" if close else None,
                )
            hint = hints.get(name, type(self.parameters[name]))
            result[name] = _converted(f"{self.name}: {name.rstrip('_')}", value, hint)
        return result


def _converted(label: str, value: Any, hint: Any) -> Any:
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in choices:
            raise OptionError(label, got=value, expected=" or ".join(map(str, choices)))
        return value
    kind = next((choice for choice in choices if choice is not type(None)), hint)
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int and float(value) != int(value):
            raise ValueError
        result = share(value) if kind is float and isinstance(value, str) else kind(value)
        if kind is float and not math.isfinite(result):
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        expected = "a finite number" if kind is float else f"a value of type {kind.__name__}"
        raise OptionError(label, got=value, expected=expected) from error
    return result


class MethodEntry(Plugin[Method]):
    """A registered method, or why it could not be loaded."""

    @property
    def method(self) -> Method | None:
        """The method; None if broken."""
        return self.loaded


@functools.cache
def registered_methods() -> tuple[MethodEntry, ...]:
    """Return every registered method sorted by class and name, broken ones last."""
    order = {"span": 0, "core": 1, "elementwise": 2}
    entries = [MethodEntry(p.point, p.loaded, p.error) for p in load_group(GROUP, Method)]
    return tuple(sorted(entries, key=lambda e: 3 if e.method is None else order[e.method.kind]))


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def get_method(name: str) -> Method:
    """Return the method registered as `name`, in capital or small letters.

    Raises:
        OptionError: there is none, it is broken, or two packages claim the name.
    """
    entries = registered_methods()
    found = [entry for entry in entries if entry.name == name]
    found = found or [entry for entry in entries if _plain(entry.name) == _plain(name)]
    if len(found) > 1:
        packages = ", ".join(entry.package for entry in found)
        raise OptionError(f"method {name!r} is registered by several packages: {packages}")
    if not found:
        known = [entry.name for entry in entries]
        close = difflib.get_close_matches(name, known, n=1)
        raise OptionError(
            f"no merge method named {name!r}",
            expected=", ".join(known),
            hint=f"Did you mean {close[0]!r}?" if close else None,
        )
    if found[0].method is None:
        raise OptionError(f"merge method {name!r} is broken", got=found[0].error)
    return found[0].method
