"""The call that a statement records, read with suspicion: statements come from strangers, too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.face.declare import Declaration
from loratools.hub.references import is_explicit
from loratools.work.digests_of import shown
from loratools.work.requests import PLACES
from loratools_formats.checkpoints.pipelines import ADAPTED
from loratools_formats.disk.errors import AdapterError, UncheckedError


@dataclass(frozen=True)
class RecordedFile:
    """A file that was read: its name, with a pipeline's component before it, and its digest."""

    name: str
    digest: Mapping[str, str]


@dataclass(frozen=True)
class RecordedInput:
    """A file or folder that a function was given.

    Attributes:
        name: what it was called.
        path: where it lay, if that was near the output.
        weight: its factor, where inputs have one.
        known_as: the name that it went by, where inputs have one.
        files: what was read from it.
        is_made: whether it was made in memory.
        made: role of the operation that made it, None if nothing says which.
        reference: how it was named, if it was on the Hub.
        commit: the commit that was read.
    """

    name: str
    path: str | None
    weight: float
    files: tuple[RecordedFile, ...]
    is_made: bool
    made: str | None
    reference: str | None
    commit: str | None
    known_as: str | None = None

    @classmethod
    def of(cls, value: Any, predicate: Mapping[str, Any]) -> RecordedInput:
        """Read one.

        Raises:
            AdapterError: it is malformed.
        """
        given = _map(value, "an input")
        roles = given.get("roles", [])
        inputs = predicate.get("inputs", [])
        if not isinstance(roles, list) or not isinstance(inputs, list):
            raise _malformed("an input")
        files = tuple(
            RecordedFile(_file_name(_text(one.get("name"), "an input")), _digest(one))
            for one in (_map(item, "an input") for item in inputs)
            if one.get("role") in roles
        )
        weight = given.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise _malformed("a weight")
        made = given.get("made")
        return cls(
            name=os.path.basename(_text(given.get("name", "input"), "an input")) or "input",
            path=_optional(given, "path"),
            weight=float(weight),
            files=files,
            is_made="made" in given,
            made=None if made is None else _text(made, "a step"),
            reference=_reference(given),
            commit=_optional(given, "commit"),
            known_as=_optional(given, "as"),
        )

    def described(self) -> str:
        """Return what to look for, for messages."""
        if not self.files:
            return self.name
        of, digest = shown(self.files[0].digest)
        kind, digest = "a header with " if of else "", digest or "an unknown digest"
        return f"{self.name}, whose {self.files[0].name} has {kind}sha256 {digest}"


@dataclass(frozen=True)
class RecordedCall:
    """A call of a public function.

    Attributes:
        function: its name.
        arguments: what it read, by parameter; a list where inputs have weights.
        options: its options, in the types of JSON.
        steps: records of operations that made inputs in memory, by role.
    """

    function: str
    arguments: Mapping[str, RecordedInput | Sequence[RecordedInput]]
    options: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, predicate: Mapping[str, Any]) -> RecordedCall:
        """Read the call that a record holds.

        Raises:
            UncheckedError: it holds none.
            AdapterError: it is malformed.
        """
        if "call" not in predicate:
            tool = predicate.get("tool")
            version = tool.get("version") if isinstance(tool, Mapping) else None
            by = " in the metadata" if predicate.get("from") == "metadata" else ""
            raise UncheckedError(
                f"the record of {predicate.get('operation')} does not say how it was called",
                got=f"a record of loratools {version}{by}",
                hint="Show its options, and run it with them: loratools provenance OUTPUT",
            )
        call = _map(predicate["call"], "the call")
        steps = _map(predicate.get("steps", {}), "the steps")
        return cls(
            function=_text(call.get("function"), "the function"),
            arguments={
                name: [RecordedInput.of(one, predicate) for one in value]
                if isinstance(value, list)
                else RecordedInput.of(value, predicate)
                for name, value in _map(call.get("arguments", {}), "the arguments").items()
            },
            options=_map(call.get("options", {}), "the options"),
            steps={role: _map(step, "a step") for role, step in steps.items()},
        )

    def check(self, declaration: Declaration) -> None:
        """Refuse a call that a function does not take.

        Raises:
            AdapterError: an argument or option that it does not have, or one is missing.
        """
        known = {*declaration.inputs, *declaration.options}
        for name in (*self.arguments, *self.options):
            if name not in known:
                raise AdapterError(f"{declaration.name} takes no such option", got=name)
        for name in sorted(declaration.required - set(self.arguments)):
            raise AdapterError(f"the record does not say what {name} was", got="nothing")
        for name in PLACES.intersection(self.options):
            raise AdapterError("a record does not say where to write", got=name)


def _file_name(text: str) -> str:
    """Return a name, with the component of a pipeline before it if that is all."""
    folder, name = os.path.split(text)
    return f"{folder}/{name}" if folder in ADAPTED else name


def _malformed(what: str) -> AdapterError:
    return AdapterError(f"the statement is malformed: {what} is of the wrong type")


def _map(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _malformed(what)
    return value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _malformed(what)
    return value


def _optional(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return None if value is None else _text(value, key)


def _reference(given: Mapping[str, Any]) -> str | None:
    """Return the name on the Hub, if it names a commit: a local path is nothing to follow."""
    text = _optional(given, "reference")
    return text if text is not None and is_explicit(text) and given.get("commit") else None


def _digest(value: Mapping[str, Any]) -> dict[str, str]:
    digest = _map(value.get("digest", {}), "a digest")
    return {key: _text(item, "a digest") for key, item in digest.items()}
