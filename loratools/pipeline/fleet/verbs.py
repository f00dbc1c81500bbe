"""What may be done to a whole fleet: public functions, and which of their inputs is each adapter.

A function's other inputs and its options are settings, which all adapters of a run share.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from loratools.algebra.ranks import RankRule
from loratools.face.declare import Declaration, declaration_of
from loratools.hub.references import Want, parse
from loratools.pipeline.steps import NEEDS_RANKS
from loratools.work.call import Call, call_of
from loratools.work.declared import Option, build
from loratools.work.requests import PLACES, Writing
from loratools.work.typed import option_value
from loratools_formats.contract.registry import get_format
from loratools_formats.core.file_names import WRITTEN_ENDINGS, without_ending
from loratools_formats.disk.errors import OptionError


@dataclass(frozen=True)
class Verb:
    """An operation over a fleet.

    Attributes:
        name: what the command line calls it.
        item: the function's parameter that gets one of the fleet.
        reports: whether its output is its result as JSON, since it makes no adapter.
    """

    name: str
    item: str
    reports: bool = False

    @property
    def function(self) -> str:
        """The name of the public function."""
        return self.name.replace("-", "_")

    @cached_property
    def call(self) -> Any:
        """The public function."""
        return getattr(import_module("loratools"), self.function)

    @property
    def declaration(self) -> Declaration:
        """What the function takes."""
        return declaration_of(self.call)

    @property
    def want(self) -> Want:
        """What each of the fleet is: an adapter, or a model."""
        return self.declaration.references[self.item].want

    @property
    def inputs(self) -> dict[str, Want]:
        """The function's other inputs, with what each is to be."""
        wanted = self.declaration.references
        return {
            name: wanted[name].want
            for name in self.declaration.inputs
            if name != self.item and name in wanted
        }

    @property
    def options(self) -> dict[str, tuple[type, Option]]:
        """The function's options by keyword, each with the dataclass that declares it."""
        known = self.declaration.options
        return {word: found for word, found in known.items() if word not in PLACES}

    def checked(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with paths made absolute, as any process of a run may read them.

        Raises:
            OptionError: the function has no such option or input, one is missing, or a value is of
                the wrong type.
        """
        found: dict[str, Any] = {}
        for word, value in settings.items():
            if word in self.inputs:
                found[word] = _absolute(value, self.inputs[word])
            elif word in self.options:
                _, made = self.options[word]
                is_path = made.type is Path and value is not None and not made.multiple
                want: Any = made.reference or "file"
                found[word] = _absolute(value, want) if is_path else value
            else:
                raise OptionError(
                    f"{self.name} has no such option",
                    got=word,
                    expected=", ".join((*self.inputs, *self.options)),
                )
        for name in sorted(self.declaration.required - {self.item}):
            if found.get(name) is None:
                raise OptionError(f"{self.name} needs `{name}`", hint=f"Give `{name}=PATH`")
        groups = self._groups(found)
        if self.name in NEEDS_RANKS and not build(RankRule, groups[RankRule]).is_given:
            raise OptionError(
                "no rule for the ranks",
                expected="`rank`, `energy`, `budget` or another rule",
                hint="Give one, such as `rank=16`",
            )
        self.recorded(found)
        if "to" in found and found["to"] is not None:
            get_format(found["to"])
        return found

    def recorded(self, settings: Mapping[str, Any]) -> Call:
        """Return the call as outputs record it, without the inputs of the function.

        Raises:
            OptionError: a value is of the wrong type, or options contradict each other.
        """
        groups = self._groups(settings)
        return call_of(self.function, {}, [build(cls, given) for cls, given in groups.items()])

    def _groups(self, settings: Mapping[str, Any]) -> dict[type, dict[str, Any]]:
        """Return the options among settings by the dataclass that declares each."""
        groups: dict[type, dict[str, Any]] = {
            cls: {} for cls, _ in self.options.values() if cls is not Writing
        }
        for word, (cls, made) in self.options.items():
            if word in settings and cls is not Writing:
                groups[cls][made.name] = option_value(cls, made, settings[word])
        return groups

    def reads_weights(self, settings: Mapping[str, Any]) -> bool:
        """Return whether tensors are read, and not only headers."""
        is_described = self.declaration.references[self.item].headers
        return not (is_described or settings.get("headers_only"))

    def makes_file(self, settings: Mapping[str, Any]) -> bool:
        """Return whether the output is an adapter or a checkpoint, and not a report."""
        return not self.reports or bool(settings.get("fix"))

    def output_name(self, name: str, settings: Mapping[str, Any]) -> str:
        """Return what the output of an adapter is called, by the adapter's own name."""
        if not self.makes_file(settings):
            return f"{name}.json"
        stem = without_ending(name)
        if settings.get("to") is not None:
            return stem + get_format(settings["to"]).ending
        if self.name == "fuse":
            base = str(settings["base"]).lower()
            endings = (end for end in WRITTEN_ENDINGS if base.endswith(end))
            return f"{stem}{next(endings, '')}"
        return stem if self.name == "extract" else name


VERBS = {
    verb.name: verb
    for verb in (
        Verb("check", "sources", reports=True),
        Verb("convert", "source"),
        Verb("dequantize", "base"),
        Verb("extract", "tuned"),
        Verb("fuse", "adapters"),
        Verb("info", "source", reports=True),
        Verb("quantize", "base"),
        Verb("repair", "source"),
        Verb("spectrum", "source", reports=True),
        Verb("squeeze", "source"),
        Verb("to-dora", "source"),
        Verb("to-lora", "source"),
        Verb("verify", "fused", reports=True),
    )
}


def get_verb(name: str) -> Verb:
    """Return an operation over a fleet.

    Raises:
        OptionError: there is none of that name.
    """
    found = VERBS.get(name.replace("_", "-"))
    if found is None:
        raise OptionError("`fleet` has no such operation", got=name, expected=", ".join(VERBS))
    return found


def _absolute(value: Any, want: Want) -> Any:
    """Return a path as all processes can follow it; a reference to the Hub stays."""
    if isinstance(value, list | tuple):
        return [_absolute(one, want) for one in value]
    if not isinstance(value, str | os.PathLike):
        raise OptionError("not a path", got=repr(value))
    if not os.path.lexists(value) and parse(value, want) is not None:
        return os.fspath(value)
    return os.path.abspath(value)
