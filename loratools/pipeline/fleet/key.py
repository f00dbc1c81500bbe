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
from loratools.pipeline.fleet.origin import Origin
from loratools.pipeline.fleet.verbs import Verb
from loratools.work.call import Call
from loratools.work.provenance import input_files
from loratools_formats.contract.files import read_adapter
from loratools_formats.disk.distant import has_distant, is_distant
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
    found: Predicate,
    verb: Verb,
    call: Call,
    origin: Origin,
    others: Mapping[str, Path],
    made_ns: int | None,
) -> bool:
    """Return whether a statement describes exactly the output that a call would make now.

    Args:
        found: what the statement says.
        verb: what is done.
        call: the call, with its options.
        origin: where the adapter comes from.
        others: where the other inputs are, by parameter.
        made_ns: when the statement was written, if that is known. Of weights of a checkpoint that
            were not here only the header may be recorded; a file changed since counts as another.
    """
    recorded, inputs = found.get("call"), found.get("inputs")
    if not isinstance(recorded, Mapping) or not isinstance(inputs, list):
        return False
    tool = {"name": "loratools", "version": __version__}
    told = (found.get("tool"), recorded.get("function"), recorded.get("options"), found.get("seed"))
    if told != (tool, call.function, json.loads(json.dumps(call.options)), call.seed):
        return False
    by_argument = _files_by_argument(recorded, inputs)
    if set(by_argument) != {verb.item, *others}:
        return False
    is_report = found.get("report_of") == verb.name
    origins = {verb.item: origin} | {name: Origin(path) for name, path in others.items()}
    try:
        return all(
            _are_there(one, by_argument[name], made_ns)
            and _would_read(verb, name, one, is_report=is_report)
            <= {str(file.get("name")) for file in by_argument[name]}
            for name, one in origins.items()
        )
    except (LoratoolsError, OSError):
        return False


def _would_read(verb: Verb, name: str, origin: Origin, *, is_report: bool) -> set[str]:
    """Return the names of files that a run would read, as one may have come since."""
    if origin.is_as_seen:
        return set()
    if is_report:
        return {place for place, _ in _read_for(verb, name, origin)}
    return _read_now(verb, name, origin) if name in verb.inputs or name == verb.item else set()


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


def digests_read(predicate: Predicate, argument: str) -> dict[str, str]:
    """Return the sha256 of the files that were read of an argument, by name, as far as it tells."""
    call, inputs = predicate.get("call"), predicate.get("inputs")
    if not isinstance(call, Mapping) or not isinstance(inputs, list):
        return {}
    files = _files_by_argument(call, inputs).get(argument, [])
    digests = {str(file.get("name")): file.get("digest") for file in files}
    return {
        name: str(digest["sha256"])
        for name, digest in digests.items()
        if isinstance(digest, Mapping) and set(digest) == {"sha256"}
    }


def _are_there(origin: Origin, files: list[Mapping[str, Any]], made_ns: int | None) -> bool:
    """Return whether an origin has all the files that were read of it."""
    path = origin.path
    for file in files:
        name, digest = str(file.get("name")), file.get("digest")
        place = path / name
        if not _is_folder(path):
            place = path if path.name == name else path.parent / name
        if not isinstance(digest, Mapping) or origin.digest_like(place, digest) != dict(digest):
            return False
        is_partial = "sha256" not in digest and not is_distant(place)
        if is_partial and made_ns is not None and os.stat(place).st_mtime_ns > made_ns:
            return False
    return bool(files)


def _is_folder(path: Path) -> bool:
    return path.is_dir() or (has_distant(path) and not is_distant(path))


def _read_now(verb: Verb, name: str, origin: Origin) -> set[str]:
    """Return the names of the files of an adapter that a run would read."""
    if (verb.want if name == verb.item else verb.inputs[name]) != "adapter":
        return set()
    origin.bring(weights=False)
    try:
        return {file.path.name for file in read_adapter(origin.path).inputs}
    except LoratoolsError:  # options tell how to read it
        return set()


def report_statement(
    verb: Verb,
    call: Call,
    origin: Origin,
    others: Mapping[str, Path],
    report: bytes,
    output: Path,
) -> bytes:
    """Return the statement beside a report, which says what it is about.

    Args:
        verb: what was done.
        call: the call, with its options.
        origin: where the adapter comes from.
        others: where the other inputs are, by parameter.
        report: what the file will hold.
        output: where it will be.
    """
    origins = {verb.item: origin} | {name: Origin(path) for name, path in others.items()}
    inputs = [
        {"role": name, "name": found, "digest": dict(digest)}
        for name in sorted(origins)
        for found, digest in _read_for(verb, name, origins[name])
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
                name: {"name": one.path.name, "path": str(one.path), "roles": [name]}
                for name, one in origins.items()
            },
            "options": dict(call.options),
        },
        **({} if call.seed is None else {"seed": call.seed}),
    }
    digest = {"sha256": hashlib.sha256(report).hexdigest()}
    return statement(predicate, [output], lambda _: digest, output=output)


def _read_for(verb: Verb, name: str, origin: Origin) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the files that a report may depend on: every file of an adapter, a model's headers."""
    path = origin.path
    if name == verb.item and verb.want == "adapter" and _is_folder(path):
        for place in origin.files():
            yield place.relative_to(path).as_posix(), origin.digest(place)
        return
    for file in input_files(name, path):
        yield file.path.name, file.digest
    if path.is_file() and path.suffix == ".safetensors":
        yield path.name, {"sha256": sha256_of(path)}
