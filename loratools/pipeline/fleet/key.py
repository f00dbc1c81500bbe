"""What says that an output is done: its own provenance, compared with what would be made now.

No database: the statement beside an output tells the operation, its options, the version and the
digests of what was read. If these are what a run would use, the output is that run's. Whoever made
it counts, be it another launcher at the same moment or a single command of last week.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loratools import __version__
from loratools.pipeline.fleet.verbs import Verb
from loratools.work.call import Call
from loratools.work.digests_of import digest_like
from loratools.work.provenance import input_files
from loratools_formats.contract.files import read_adapter
from loratools_formats.disk.errors import LoratoolsError
from loratools_formats.disk.provenance import sha256_of, statement

Predicate = Mapping[str, Any]


def key_of(predicate: Predicate) -> str | None:
    """Return the key of an output by what its statement says; None if it does not say enough.

    It is the sha256 of the operation, its options, the version, and of each input the digests.
    """
    call, inputs = predicate.get("call"), predicate.get("inputs")
    if not isinstance(call, Mapping) or not isinstance(inputs, list):
        return None
    read = {
        name: sorted(json.dumps(file.get("digest"), sort_keys=True) for file in files)
        for name, files in _files_by_argument(call, inputs).items()
    }
    content = [
        call.get("function"),
        call.get("options"),
        predicate.get("seed"),
        predicate.get("tool"),
        read,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_current(
    found: Predicate, verb: Verb, call: Call, arguments: Mapping[str, Path], made_ns: int | None
) -> bool:
    """Return whether a statement tells of just the output that a call would make now.

    Args:
        found: what the statement says.
        verb: what is done.
        call: the call, with its options.
        arguments: where its inputs are, by parameter.
        made_ns: when the statement was written, if that is known. Weights of checkpoints are
            recorded by their headers, and a file changed since then counts as another.
    """
    recorded, inputs = found.get("call"), found.get("inputs")
    if not isinstance(recorded, Mapping) or not isinstance(inputs, list):
        return False
    tool = {"name": "loratools", "version": __version__}
    told = (found.get("tool"), recorded.get("function"), recorded.get("options"), found.get("seed"))
    if told != (tool, call.function, json.loads(json.dumps(call.options)), call.seed):
        return False
    by_argument = _files_by_argument(recorded, inputs)
    if set(by_argument) != set(arguments):
        return False
    is_report = found.get("report_of") == verb.name
    for name, path in arguments.items():
        files = by_argument[name]
        try:
            if not _are_there(path, files, made_ns):
                return False
            if is_report:
                now = {place for place, _ in _read_for(verb, name, path)}
            elif name in verb.inputs or name == verb.item:
                now = _read_now(verb, name, path)
            else:
                now = set()
        except (LoratoolsError, OSError):
            return False
        if not now <= {str(file.get("name")) for file in files}:
            return False  # a file came that would be read, too
    return True


def _files_by_argument(
    call: Mapping[str, Any], inputs: list[Any]
) -> dict[str, list[Mapping[str, Any]]]:
    """Return the files that were read of each argument, as the statement tells them."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for name, value in dict(call.get("arguments") or {}).items():
        several = value if isinstance(value, list) else [value]
        roles = {r for one in several if isinstance(one, Mapping) for r in one.get("roles") or ()}
        found[name] = [f for f in inputs if isinstance(f, Mapping) and f.get("role") in roles]
    return found


def _are_there(path: Path, files: list[Mapping[str, Any]], made_ns: int | None) -> bool:
    """Return whether a path has all the files that were read of it."""
    for file in files:
        name, digest = str(file.get("name")), file.get("digest")
        place = path / name if path.is_dir() else path if path.name == name else path.parent / name
        if not isinstance(digest, Mapping) or digest_like(place, digest) != dict(digest):
            return False
        is_partial = "headerSha256" in digest
        if is_partial and made_ns is not None and os.stat(place).st_mtime_ns > made_ns:
            return False
    return bool(files)


def _read_now(verb: Verb, name: str, path: Path) -> set[str]:
    """Return the names of the files of an adapter that a run would read."""
    if (verb.want if name == verb.item else verb.inputs[name]) != "adapter":
        return set()
    try:
        return {file.path.name for file in read_adapter(path).inputs}
    except LoratoolsError:  # options tell how to read it
        return set()


def report_statement(
    verb: Verb, call: Call, arguments: Mapping[str, Path], report: Path, output: Path
) -> bytes:
    """Return the statement beside a report, which says what it is about.

    Args:
        verb: what was done.
        call: the call, with its options.
        arguments: where its inputs are, by parameter.
        report: the file.
        output: where it will be.
    """
    inputs = [
        {"role": name, "name": found, "digest": dict(digest)}
        for name, path in arguments.items()
        for found, digest in _read_for(verb, name, path)
    ]
    predicate = {
        "tool": {"name": "loratools", "version": __version__},
        "operation": verb.name,
        "options": dict(call.options),
        "inputs": inputs,
        "report_of": verb.name,
        "call": {
            "function": call.function,
            "arguments": {
                name: {"name": path.name, "path": str(path), "roles": [name]}
                for name, path in arguments.items()
            },
            "options": dict(call.options),
        },
        **({} if call.seed is None else {"seed": call.seed}),
    }
    return statement(predicate, [report], output=output)


def _read_for(verb: Verb, name: str, path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the files that a report may depend on: every file of an adapter, a model's headers."""
    if name != verb.item or verb.want != "adapter" or not path.is_dir():
        for file in input_files(name, path):
            yield file.path.name, file.digest
        if path.is_file() and path.suffix == ".safetensors":
            yield path.name, {"sha256": sha256_of(path)}
        return
    for root, folders, names in os.walk(path):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for found in sorted(one for one in names if not one.startswith(".")):
            place = Path(root) / found
            yield place.relative_to(path).as_posix(), {"sha256": sha256_of(place)}
