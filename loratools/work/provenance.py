"""What an operation records about itself in its output: how it was called, and with which files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools import __version__
from loratools.work.call import Call, running_call
from loratools.work.environment import environment
from loratools.work.history import history_of
from loratools.work.weight_digests import weight_digests
from loratools_formats.checkpoints.checkpoint import CONFIG_FILE, Checkpoint, read_checkpoint
from loratools_formats.checkpoints.pipelines import component_folders, is_pipeline
from loratools_formats.containers.safetensors_read import header_digest
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import LoratoolsError, MissingFileError
from loratools_formats.disk.files import RegularFile
from loratools_formats.disk.hub_cache import cached_place
from loratools_formats.disk.provenance import OPERATION_KEY, sha256_of


@dataclass(frozen=True)
class InputFile:
    """A file that took part.

    Attributes:
        role: what it was for.
        path: where it lies.
        digest: its sha256; of weights of models that of the header beside it.
        component: the folder of a pipeline that it lies in, if it was read as a part of one.
    """

    role: str
    path: Path
    digest: Mapping[str, str]
    component: str = ""

    def record(self) -> dict[str, Any]:
        """Return it as JSON values, without the folders that it lies in, but for a component's."""
        name = f"{self.component}/{self.path.name}" if self.component else self.path.name
        return {"role": self.role, "name": name, "digest": dict(self.digest)}


DROPPED = "dropped-modules"
"""Code of the finding that modules were taken out; it stands by the patterns that told which."""


def operation_record(
    operation: str,
    inputs: Mapping[str, Adapter],
    options: Mapping[str, Any],
    base: Checkpoint | None = None,
    tuned: Checkpoint | None = None,
    others: Sequence[InputFile] = (),
) -> dict[str, Any]:
    """Return the record of an operation: everything that determines its output's bytes.

    The call of the public function that runs is part of it, so that it can be done again.

    Args:
        operation: the command's name.
        inputs: adapters by their role. Their files are named without folders.
        options: the options that differ from nothing, as JSON values.
        base: a checkpoint that was changed or read.
        tuned: another that it was compared with.
        others: further files.
    """
    ignored = {
        role: [each.where for each in adapter.findings if each.code == "ignored-config-key"]
        for role, adapter in inputs.items()
    }
    dropped = {
        role: [each.where for each in adapter.findings if each.code == DROPPED]
        for role, adapter in inputs.items()
    }
    made = {role: adapter.provenance for role, adapter in inputs.items() if adapter.provenance}
    files = [*others, *_of_checkpoint("base", base), *_of_checkpoint("tuned", tuned)]
    files += [
        InputFile(role, file.path, {"sha256": file.sha256()})
        for role, several in _files_by_role(inputs)
        for file in several
    ]
    call = running_call()  # not of another operation, which this one is a step of
    called: dict[str, Any] = {}
    if call is not None and call.function == operation.replace("-", "_"):
        arguments, unread = _arguments(call, inputs, files)
        files += unread
        called["call"] = {
            "function": call.function,
            "arguments": arguments,
            "options": dict(call.options),
        }
        if call.seed is not None:
            called["seed"] = call.seed
    history = history_of(
        [(file.path, file.digest) for file in files],
        {
            adapter.inputs[0].path: adapter.metadata
            for adapter in inputs.values()
            if adapter.inputs and adapter.provenance is None
        },
    )
    return {
        "tool": {"name": "loratools", "version": __version__},
        "operation": operation,
        "options": dict(options),
        "inputs": [file.record() for file in files],
        "environment": environment(with_torch=options.get("device", "cpu") != "cpu"),
        **called,
        **(
            {"ignoredKeys": {r: k for r, k in ignored.items() if k}}
            if any(ignored.values())
            else {}
        ),
        **({"dropped": {r: d for r, d in dropped.items() if d}} if any(dropped.values()) else {}),
        # Inputs that operations made in memory: how, since the files are those they began with.
        **({"steps": made} if made else {}),
        **({"history": history} if history else {}),
    }


def _files_by_role(
    inputs: Mapping[str, Adapter],
) -> Iterator[tuple[str, tuple[RegularFile, ...]]]:
    for role, adapter in inputs.items():
        yield role, adapter.inputs
        yield from adapter.other_inputs.items()


def weight_files(
    role: str, files: Sequence[tuple[RegularFile, Mapping[str, str]]]
) -> Iterator[InputFile]:
    """Yield the weight files of a model, with digests of all bytes that are on this machine.

    Args:
        role: of the model.
        files: with the digest of the header, by which outputs of loratools are known too, and which
            is all that can be told of a file on the Hub that was not fetched.
    """
    whole = iter(weight_digests([file for file, _ in files if file.is_here]))
    for file, header in files:
        digest = {"sha256": next(whole), **header} if file.is_here else header
        yield InputFile(role, file.path, digest)


def _of_checkpoint(role: str, checkpoint: Checkpoint | None) -> Iterator[InputFile]:
    if checkpoint is None:
        return
    if checkpoint.components:
        for each in checkpoint.files:
            name = each.file.path.parent.name
            for one in weight_files(f"{role} {name}", [(each.file, header_digest(each))]):
                yield replace(one, component=name)
        for other in checkpoint.read:
            name = other.path.parent.name
            yield InputFile(f"{role} {name}", other.path, {"sha256": _as_read(other)}, name)
        return
    yield from weight_files(role, [(each.file, header_digest(each)) for each in checkpoint.files])
    for file in checkpoint.read:
        if file.path.name == CONFIG_FILE:  # what is tied, and how weights are quantised
            yield InputFile(role, file.path, {"sha256": _as_read(file)})


def _as_read(file: RegularFile) -> str:
    """Return the digest of a file as it was when it was read.

    Raises:
        AdapterError: it changed since.
    """
    digest = file.sha256()
    file.check_unchanged()
    return digest


def _arguments(
    call: Call, inputs: Mapping[str, Adapter], files: Sequence[InputFile]
) -> tuple[dict[str, Any], list[InputFile]]:
    """Return what a function was given, as JSON values, and the files that no reader named."""
    unread: list[InputFile] = []
    places = _places_of(files)

    def one(label: str, value: Any) -> dict[str, Any]:
        if isinstance(value, Adapter) and (value.provenance is not None or value.source is None):
            roles = [r for r, a in inputs.items() if a.provenance is value.provenance is not None]
            return {"made": roles[0]} if roles else {"made": None}
        path = Path(os.path.abspath(path_of_input(value)))
        real = os.path.realpath(path)
        found = sorted(places.get((str(path), False), set()) | places.get((real, True), set()))
        if not found:
            unread.extend(more := list(input_files(label, path)))
            found = sorted({file.role for file in more})
        place = cached_place(path)
        named = {"reference": place.reference, "commit": place.commit} if place else {}
        name = path.name if place is None else place.name
        return {"path": str(path), "name": name, "roles": found, **named}

    arguments: dict[str, Any] = {}
    for name, value in call.arguments.items():
        several = _several(value)
        if several is None:
            arguments[name] = one(name, value)
        else:
            arguments[name] = [
                {**one(f"{name} {index}", source), **beside}
                for index, (source, beside) in enumerate(several)
            ]
    return arguments, unread


def _several(value: Any) -> list[tuple[Any, dict[str, Any]]] | None:
    """Return adapters with their weights, or the names they go by; None for a single one."""
    if isinstance(value, Mapping):
        return [
            (key, {"weight": item})
            if isinstance(item, int | float)
            else (item, {"weight": 1.0, "as": str(key)})
            for key, item in value.items()
        ]
    if isinstance(value, Adapter | Checkpoint | str | os.PathLike):
        return None
    pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in value]
    return [(item, {"weight": weight}) for item, weight in pairs]


def path_of_input(value: Any) -> Any:
    """Return the path of an adapter or a checkpoint, None of one in memory; a path as it is."""
    if isinstance(value, Adapter):
        return value.source
    return value.path if isinstance(value, Checkpoint) else value


def _places_of(files: Iterable[InputFile]) -> dict[tuple[str, bool], set[str]]:
    """Return the roles of files by their paths and folders: (path, whether links are followed).

    Those of components are also by the pipeline's folder.
    """
    found: dict[tuple[str, bool], set[str]] = {}
    for file in files:
        absolute = os.path.abspath(file.path)
        folder = os.path.dirname(absolute)
        whole = (os.path.dirname(folder),) if file.component else ()
        for place in (absolute, folder, *whole):
            for key in ((place, False), (os.path.realpath(place), True)):
                found.setdefault(key, set()).add(file.role)
    return found


def input_files(role: str, path: Path) -> Iterator[InputFile]:
    """Yield the files of a path that took part without being read as an adapter.

    Raises:
        LoratoolsError: one cannot be read.
    """
    if path.is_file() and path.suffix != ".safetensors":
        yield InputFile(role, path, {"sha256": sha256_of(path)})
        return
    if is_pipeline(path):
        for name in component_folders(path):
            with contextlib.suppress(
                MissingFileError
            ):  # a text encoder that is pickled, or not here
                part = read_checkpoint(path / name)
                for one in _of_checkpoint(f"{role} {name}", part):
                    yield replace(one, component=name)
        return
    try:
        yield from _of_checkpoint(role, read_checkpoint(path))
    except LoratoolsError:
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        for file in files:
            if file.is_file() and not file.name.startswith("."):
                yield InputFile(role, file, {"sha256": sha256_of(file)})


def record_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the record as string metadata for a safetensors header, sorted by key.

    Without the machine's facts, which the statement beside the output has: files whose tensors are
    equal stay equal.
    """

    def compact(value: Any) -> str:
        return strict_json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    commits = {name: one["reference"] for name, one in _labelled(record) if one.get("commit")}
    return {
        **({"loratools.commits": compact(commits)} if commits else {}),
        **({"loratools.dropped": compact(record["dropped"])} if "dropped" in record else {}),
        "loratools.inputs": compact(
            {f"{i['role']}/{i['name']}": _hash(i["digest"]) for i in record["inputs"]}
        ),
        OPERATION_KEY: record["operation"],
        "loratools.options": compact(record["options"]),
        **({"loratools.seed": str(record["seed"])} if "seed" in record else {}),
        "loratools.version": record["tool"]["version"],
    }


def _labelled(record: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the arguments of a record's call with their labels."""
    for name, value in record.get("call", {}).get("arguments", {}).items():
        if isinstance(value, list):
            for index, item in enumerate(value):
                yield f"{name} {index}", item
        else:
            yield name, value


def _hash(digest: Mapping[str, str]) -> str:
    return digest["sha256"] if "sha256" in digest else digest["headerSha256"]
