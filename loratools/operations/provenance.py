"""How an output was made, back to the originals, as statements and metadata record it.

Nothing is computed: who says so is the file beside the output (or its metadata), and the digest of
every subject shows whether it speaks of the bytes that are there.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loratools.work.digests_of import digest_like
from loratools.work.history import about, from_metadata, tells_how, unfolded
from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.contract.path_kinds import missing
from loratools_formats.disk.errors import AdapterError, LoratoolsError, MissingFileError
from loratools_formats.disk.files import is_trouble
from loratools_formats.disk.provenance import (
    PROVENANCE_FILE,
    load_statement,
    sha256_of,
    statement_place,
)

Predicate = Mapping[str, Any]


@dataclass(frozen=True)
class ChainFile:
    """A file that a step made.

    Attributes:
        name: its name, in its folder.
        digest: what the statement says of it.
    """

    name: str
    digest: Mapping[str, str]


@dataclass(frozen=True)
class ChainInput:
    """A file that a step read.

    Attributes:
        role: what it was for.
        given: what the file or folder was called that was given; None if nobody recorded it.
        name: its name, without folders.
        digest: its digest; empty if it was never in a file.
        step: number of the step that made it; None for an original.
        reference: how it was named, if that was on the Hub.
        commit: the commit that the name stood for.
    """

    role: str
    given: str | None
    name: str
    digest: Mapping[str, str]
    step: int | None
    reference: str | None
    commit: str | None


@dataclass(frozen=True)
class ChainStep:
    """An operation that was done.

    Attributes:
        number: counts from 1; the last step made what was asked about.
        operation: its name.
        version: of loratools.
        options: that determined the output.
        seed: of what was random; None if nothing was.
        told_by: the statement beside the output, or its own metadata.
        environment: the machine's facts that may change last bits.
        inputs: what it read.
        files: what it made; empty for a result that was in memory only.
    """

    number: int
    operation: str
    version: str
    options: Mapping[str, Any]
    seed: int | None
    told_by: Literal["statement", "metadata"]
    environment: Mapping[str, str]
    inputs: tuple[ChainInput, ...]
    files: tuple[ChainFile, ...]


@dataclass(frozen=True)
class Chain:
    """How an output was made.

    Attributes:
        path: the output.
        steps: every operation, each after those that made its inputs.
        changed: files that are not the ones which the statement is about any more.
    """

    path: Path
    steps: tuple[ChainStep, ...]
    changed: tuple[str, ...]


def statement_of(path: Path) -> dict[str, Any]:
    """Return the statement about an output, or what its metadata says in place of one.

    Args:
        path: a folder, a file, or the statement itself.

    Raises:
        MissingFileError: nothing is there, or nothing says how it was made.
        AdapterError: the statement is not sound.
    """
    if not path.exists():
        raise missing(path)
    if path.name.endswith(PROVENANCE_FILE):
        return load_statement(path)
    place = statement_place(path)
    if place.exists():
        return load_statement(place)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    told = next(filter(None, map(_of_metadata, files)), None)
    if told is None:
        raise MissingFileError(
            "nothing says how it was made",
            path=path,
            expected=f"{place.name} beside or inside it, or metadata of loratools",
            hint="Only outputs of loratools have one. To see what it is: "
            f"loratools info {shlex.quote(str(path))}",
        )
    return told


def _of_metadata(path: Path) -> dict[str, Any] | None:
    try:
        metadata = read_safetensors(path).metadata
    except LoratoolsError as error:
        if is_trouble(error):
            raise
        return None
    return from_metadata(metadata, path.name, {"sha256": sha256_of(path)})


def output_of(path: Path) -> Path:
    """Return the output that a statement is about, by the place where it lies."""
    if path.name == PROVENANCE_FILE:
        return path.parent
    return Path(str(path).removesuffix(f".{PROVENANCE_FILE}"))


def chain(path: Path) -> Chain:
    """Return how an output was made, back to files that nothing tells more of.

    Args:
        path: a folder, a file, or the statement about one.

    Raises:
        MissingFileError: nothing is there, or nothing says how it was made.
        AdapterError: the statement is not sound.
    """
    statement = statement_of(path)
    try:
        *earlier, own = unfolded(statement)
        steps = _Steps(earlier)
        steps.add(own)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"the statement is malformed: {error!r}", path=path) from error
    return Chain(output_of(path), tuple(steps.found), tuple(changed(statement, output_of(path))))


def changed(statement: Mapping[str, Any], output: Path) -> Iterator[str]:
    """Yield the names of files which are not those that a statement is about."""
    for subject in statement["subject"]:
        name = str(subject.get("name", ""))
        file = output / name if output.is_dir() else output
        try:
            found = digest_like(file, subject.get("digest", {}))
        except LoratoolsError:
            found = None
        if found is None or found != subject.get("digest"):
            yield name


class _Steps:
    """Statements turned into numbered steps, originals first."""

    def __init__(self, statements: Sequence[Mapping[str, Any]]) -> None:
        self.found: list[ChainStep] = []
        self._statements = statements
        self._numbers: dict[int, int] = {}
        self._open: set[int] = set()

    def add(self, statement: Mapping[str, Any]) -> int:
        """Add the step of a statement after those before it; return its number."""
        key = id(statement)
        if key in self._numbers:
            return self._numbers[key]
        if key in self._open:
            raise ValueError("a file was made from itself")
        self._open.add(key)
        files = tuple(
            ChainFile(str(one.get("name", "")), _digest(one)) for one in statement["subject"]
        )
        self._numbers[key] = self._step(statement["predicate"], files)
        return self._numbers[key]

    def _step(self, predicate: Predicate, files: tuple[ChainFile, ...]) -> int:
        in_memory = {
            str(role): self._step(made, ()) for role, made in predicate.get("steps", {}).items()
        }
        named, makers = _named_by_role(predicate), self._makers(predicate)
        inputs = [
            ChainInput(role, None, "in memory", {}, number, None, None)
            for role, number in in_memory.items()
        ]
        for one in predicate.get("inputs", []):
            role, digest = str(one.get("role", "")), _digest(one)
            if role in in_memory:
                continue
            maker = makers.get(role)
            maker = None if maker is None or about(maker, digest) is None else maker
            reference = named.get(role, {})
            inputs.append(
                ChainInput(
                    role,
                    _text(reference.get("name")),
                    str(one.get("name", "")),
                    digest,
                    None if maker is None else self.add(maker),
                    _text(reference.get("reference")),
                    _text(reference.get("commit")),
                )
            )
        seed = predicate.get("seed", predicate.get("options", {}).get("seed"))
        step = ChainStep(
            number=len(self.found) + 1,
            operation=str(predicate.get("operation")),
            version=str(predicate.get("tool", {}).get("version")),
            options=dict(predicate.get("options", {})),
            seed=seed if isinstance(seed, int) else None,
            told_by="metadata" if predicate.get("from") == "metadata" else "statement",
            environment={str(k): str(v) for k, v in predicate.get("environment", {}).items()},
            inputs=tuple(inputs),
            files=files,
        )
        self.found.append(step)
        return step.number

    def _makers(self, predicate: Predicate) -> dict[str, Mapping[str, Any]]:
        """Return the statements about the weights of inputs, by their role."""
        found: dict[str, Mapping[str, Any]] = {}
        for one in predicate.get("inputs", []):
            role, digest = str(one.get("role", "")), _digest(one)
            if tells_how(str(one.get("name", ""))) and role not in found:
                makers = [each for each in self._statements if about(each, digest) is not None]
                found[role] = makers[0] if makers else {"subject": []}
        return found


def _named_by_role(predicate: Predicate) -> dict[str, Mapping[str, Any]]:
    named: dict[str, Mapping[str, Any]] = {}
    for value in predicate.get("call", {}).get("arguments", {}).values():
        for one in value if isinstance(value, list) else [value]:
            named |= dict.fromkeys(one.get("roles", []), one)
    return named


def _digest(one: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in one.get("digest", {}).items()}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
