"""What the inputs of an operation say about how they were made, carried into its record.

A statement beside an input is carried if it is about the input's very bytes, with those that it
carries itself, each once: an output then knows its way back to the originals even where they are
gone. An input without a statement may have its last operation in its own metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools_formats.disk.provenance import (
    OPERATION_KEY,
    PREDICATE_TYPE,
    is_sound,
    read_statement,
    statement_beside,
)
from loratools_formats.disk.strict_json import StrictJsonError, loads

MOST_STATEMENTS = 500
MOST_BYTES = 4 << 20

Digest = Mapping[str, str]


def history_of(
    files: Iterable[tuple[Path, Digest]], metadata: Mapping[Path, Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Return the statements that led to some files, sorted by their first subject's digest.

    Beyond `MOST_STATEMENTS` or `MOST_BYTES` the older ones are left out.

    Args:
        files: with their digests, as a record has them.
        metadata: of files whose own metadata may tell how they were made.
    """
    near: dict[str, dict[str, Any]] = {}
    far: dict[str, dict[str, Any]] = {}
    for path, digest in files:
        found = statement_about(path, digest) if tells_how(path.name) else None
        if found is None and path in metadata:
            found = from_metadata(metadata[path], path.name, digest)
        if found is None:
            continue
        *earlier, own = unfolded(found)
        near[_key(own)] = own
        far |= {_key(each): each for each in earlier}
    kept: list[dict[str, Any]] = []
    nbytes = 0
    for each in {**near, **{key: one for key, one in far.items() if key not in near}}.values():
        nbytes += len(json.dumps(each))
        if nbytes > MOST_BYTES or len(kept) == MOST_STATEMENTS:
            break
        kept.append(each)
    return sorted(kept, key=_key)


def statement_about(path: Path, digest: Digest) -> dict[str, Any] | None:
    """Return the statement beside a file, or in its folder, if it is about the file's bytes."""
    for place in statement_beside(path):
        found = read_statement(place)
        if found is not None and about(found, digest) is not None:
            return found
    return None


def tells_how(name: str) -> bool:
    """Whether a file is one that a statement is looked for: weights, not what lies beside them.

    Two outputs may have the same configuration.
    """
    return not name.endswith((".json", ".yaml", ".toml", ".md", ".txt"))


def about(statement: Mapping[str, Any], digest: Digest) -> Mapping[str, Any] | None:
    """Return the subject of a statement that has a digest, None if none has."""
    return next((one for one in statement["subject"] if agree(one.get("digest"), digest)), None)


def agree(one: object, other: Digest) -> bool:
    """Return whether two digests are of the same bytes, as far as both tell."""
    if not isinstance(one, Mapping):
        return False
    common = one.keys() & other.keys()
    return bool(common) and all(one[key] == other[key] for key in common)


def unfolded(statement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the statements that one carries, and then itself without them."""
    predicate = dict(statement["predicate"])
    earlier = predicate.pop("history", [])
    own = {"subject": statement["subject"], "predicate": predicate}
    return [*(each for each in earlier if is_sound(each)), own]


def _key(statement: Mapping[str, Any]) -> str:
    return json.dumps(statement, sort_keys=True)


def from_metadata(values: Mapping[str, str], name: str, digest: Digest) -> dict[str, Any] | None:
    """Return what a file's own metadata says of how it was made, as a statement; None if nothing.

    It says less than a statement: what was asked for, and where the inputs lay, it does not hold.
    """
    operation, version = values.get(OPERATION_KEY), values.get("loratools.version")
    if operation is None or version is None:
        return None
    try:
        options = loads(values.get("loratools.options", "{}").encode(), max_depth=32)
        inputs = loads(values.get("loratools.inputs", "{}").encode(), max_depth=4)
    except (StrictJsonError, UnicodeEncodeError):
        return None
    if not isinstance(options, dict) or not isinstance(inputs, dict):
        return None
    predicate: dict[str, Any] = {
        "tool": {"name": "loratools", "version": version},
        "operation": operation,
        "options": options,
        "inputs": _inputs(inputs),
        "from": "metadata",
    }
    subject: Sequence[Mapping[str, Any]] = [{"name": name, "digest": dict(digest)}]
    return {"subject": subject, "predicateType": PREDICATE_TYPE, "predicate": predicate}


def _inputs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key, value in values.items():
        role, _, name = key.rpartition("/")
        found.append({"role": role, "name": name, "digest": {"sha256": str(value)}})
    return found
