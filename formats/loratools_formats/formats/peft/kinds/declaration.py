"""How a kind of PEFT adapter is described: tensor names, configuration keys, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

Parts = Mapping[str, TensorRef]
Shape = tuple[int | None, int | None]


@dataclass(frozen=True)
class Module:
    """What is known of one module while its settings are resolved.

    Attributes:
        path: module path.
        parts: its tensors, own and shared, by part.
        alpha: the `alpha_pattern`'s number for it, else the configuration's.
        rank: the `rank_pattern`'s number for it, else the configuration's.
    """

    path: str
    parts: Parts
    alpha: float | None
    rank: int | None

    def side(self, part: str, axis: int) -> int:
        """Return the length of an axis of a part.

        Raises:
            AdapterError: it has no such axis.
        """
        shape = self.parts[part].shape
        if len(shape) <= axis:
            raise AdapterError(
                "tensor has too few axes", tensor=self.parts[part].key, got=list(shape)
            )
        return shape[axis]


class Values:
    """A configuration whose keys are checked as they are used.

    Args:
        values: the parsed JSON object.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def _value(self, key: str, types: tuple[type, ...], expected: str) -> Any:
        if key not in self._values:
            raise AdapterError(f"config lacks {key}", expected=expected)
        value = self._values[key]
        finite = not isinstance(value, float) or math.isfinite(value)
        if type(value) not in types or not finite:
            raise AdapterError(f"config value {key} is wrong", got=value, expected=expected)
        return value

    def number(self, key: str) -> float:
        """Return a number."""
        return float(self._value(key, (int, float), "a number"))

    def number_or_none(self, key: str) -> float | None:
        """Return a number, None if the key is absent or null."""
        return None if self._values.get(key) is None else self.number(key)

    def count(self, key: str) -> int:
        """Return a whole number above 0."""
        value: int = self._value(key, (int,), "a whole number above 0")
        if value < 1:
            raise AdapterError(
                f"config value {key} is wrong", got=value, expected="a whole number above 0"
            )
        return value

    def whole(self, key: str) -> int:
        """Return a whole number."""
        value: int = self._value(key, (int,), "a whole number")
        return value

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        value: bool = self._value(key, (bool,), "true or false")
        return value

    def flag_or_false(self, key: str) -> bool:
        """Return a boolean, False if the key is absent or null."""
        return False if self._values.get(key) is None else self.flag(key)

    def text(self, key: str) -> str:
        """Return a string."""
        value: str = self._value(key, (str,), "a string")
        return value

    def names(self, key: str, path: str) -> bool:
        """Return whether a regular expression, or an entry of a list, names a module."""
        found: str | list[Any] = self._value(key, (str, list), "names of modules")
        if isinstance(found, str):
            return re.fullmatch(found, path) is not None
        return any(path.endswith(entry) for entry in found if isinstance(entry, str))

    def indices(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers, none below 0."""
        found: list[Any] = self._value(key, (list,), "a list of whole numbers")
        if not all(type(number) is int and number >= 0 for number in found):
            raise AdapterError(
                f"config value {key} is wrong", got=found, expected="a list of whole numbers"
            )
        return tuple(found)

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None


@dataclass(frozen=True)
class PeftKind:
    """How PEFT stores one kind.

    Attributes:
        kind: name of the declaration.
        parts: part by the end of a tensor's name, after the module path; `{}` in both stands for a
            number.
        shape: (out, in), None for what the tensors do not tell.
        settings: numbers that ΔW depends on.
        used: configuration keys that `settings` or the rank and alpha patterns use.
        neutral: further keys that leave ΔW alone.
        shared: part by the name of a tensor that all modules have in common; `{}` in it stands for
            anything.
        kernel_of: parts whose axes after the second are a convolution's kernel.
        layer: what its modules are, where the tensors' names do not say `embedding`.
        takes_embeddings: whether it takes embeddings as if they were linear layers of their stored
            shape, so that only the module's name tells.
    """

    kind: str
    parts: Mapping[str, str]
    shape: Callable[[Module], Shape]
    settings: Callable[[Values, Module], dict[str, Any]] = lambda _values, _module: {}
    used: frozenset[str] = frozenset()
    neutral: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    kernel_of: tuple[str, ...] = ()
    layer: Literal["linear", "embedding"] = "linear"
    takes_embeddings: bool = False


NOT_A_CHANGE = {
    "PROMPT_TUNING": "it adds tokens to the input and changes no weight",
    "PREFIX_TUNING": "it adds keys and values to the cache and changes no weight",
    "P_TUNING": "it adds tokens to the input and changes no weight",
    "MULTITASK_PROMPT_TUNING": "it adds tokens to the input and changes no weight",
    "ADAPTION_PROMPT": "it adds gated attention to learned tokens and changes no weight",
    "CPT": "it adds tokens to the input and changes no weight",
    "CARTRIDGE": "it adds keys and values to the cache and changes no weight",
    "XLORA": "it mixes adapters per token",
    "POLY": "it mixes adapters per task",
    "LILY": "it is routed per input",
    "SHADOW": "it runs a second network beside the model",
    "LN_TUNING": "it replaces norm weights, and has no weight change to fold",
}
"""Kinds of PEFT that are recognised and have no change of weights that could be told, and why."""
