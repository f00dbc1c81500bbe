"""The record of how an output was made, kept beside it.

An in-toto Statement, version 1: plain JSON that says which files (by digest) came from which
inputs (by digest) through which operation, so that it can be checked, repeated, or signed later
by other tools. It holds no time, and of paths only those of inputs that lie near the output,
relative to the folder that holds it: equal runs give equal bytes, and no folder of the user is
recorded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, LoratoolsError
from loratools_formats.disk.files import RegularFile, is_trouble, read_small_file
from loratools_formats.disk.strict_json import parsed_object

PROVENANCE_FILE = "provenance.json"
RECIPE_FILE = "recipe.yaml"
"""What a merge writes beside its output, to repeat it."""
PREDICATE_TYPE = "urn:loratools:operation:v1"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
OPERATION_KEY = "loratools.operation"
"""Metadata of every weight file of ours: the command that made it."""
RECORD_KEYS = (
    "loratools.commits",
    "loratools.dropped",
    "loratools.inputs",
    OPERATION_KEY,
    "loratools.options",
    "loratools.seed",
    "loratools.version",
)
"""Metadata about the operation that made a file, and about no earlier one."""
MADE_HERE = b"# Made by loratools."
"""How a text file of ours begins that lies beside an output."""

MOST_STATEMENT_BYTES = 16 << 20
_MOST_DEPTH = 32

_SURROGATE = re.compile("[\ud800-\udfff]")
_TOLD_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")
"""How a byte of a file's name that is no UTF-8 stands in a statement."""


def with_record(metadata: Mapping[str, str], record: Mapping[str, str]) -> dict[str, str]:
    """Return a file's metadata with what an operation records; what an earlier one did goes."""
    return {**{k: v for k, v in metadata.items() if k not in RECORD_KEYS}, **record}


def statement(
    predicate: Mapping[str, Any],
    files: Iterable[Path],
    digest: Callable[[Path], Mapping[str, str]] | None = None,
    folder: Path | None = None,
    output: Path | None = None,
) -> bytes:
    """Return the statement that `files` were made as `predicate` says, as UTF-8 JSON.

    Source: https://github.com/in-toto/attestation, spec/v1/statement.md.

    Args:
        predicate: how they were made.
        files: the files.
        digest: what to say of each; its sha256 by default.
        folder: what they are named relative to; None for their names alone.
        output: the path that the output will have, to which paths of inputs are relative;
            None to leave them out.
    """
    describe = digest or (lambda path: {"sha256": sha256_of(path)})
    subject = [
        {
            "name": path.name if folder is None else path.relative_to(folder).as_posix(),
            "digest": dict(describe(path)),
        }
        for path in files
    ]
    content = {
        "_type": _STATEMENT_TYPE,
        "subject": subject,
        "predicateType": PREDICATE_TYPE,
        "predicate": _placed(predicate, None if output is None else _home(output)),
    }
    text = strict_json.dumps(content, indent=2, sort_keys=True)
    # Bytes of file names and arguments that are no UTF-8, which JSON cannot hold.
    return (_SURROGATE.sub(lambda found: f"\\\\u{ord(found[0]):x}", text) + "\n").encode()


def statement_of_one(
    predicate: Mapping[str, Any],
    path: Path,
    file: Path,
    digest: Callable[[Path], Mapping[str, str]] | None = None,
) -> bytes:
    """Return the statement that one file was made as `predicate` says.

    Args:
        predicate: how it was made.
        path: the name it will have.
        file: where it lies now.
        digest: what to say of it; its sha256 by default.
    """
    describe = digest or (lambda place: {"sha256": sha256_of(place)})
    return statement(predicate, [path], lambda _: describe(file), output=path)


def _home(output: Path) -> Path:
    return Path(os.path.realpath(output)).parent


def _placed(value: Any, home: Path | None) -> Any:
    """Return a predicate with its absolute paths relative to a folder, those far away left out."""
    if isinstance(value, Mapping):
        found = {key: _placed(item, home) for key, item in value.items()}
        path = found.get("path")
        if isinstance(path, str) and os.path.isabs(path) and "roles" in found:
            near = None if home is None else _near(path, home)
            del found["path"]
            found |= {} if near is None else {"path": near}
        return found
    if isinstance(value, list | tuple):
        return [_placed(item, home) for item in value]
    return value


def _near(path: str, home: Path) -> str | None:
    """Return a path relative to a folder, if it lies in it or in the one above."""
    real = Path(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if not real.is_relative_to(home.parent) or home.parent == home:
        return None
    return Path(os.path.relpath(real, home)).as_posix()


def statement_place(output: Path) -> Path:
    """Return where the statement about an output lies: in a folder, or beside a file."""
    return output / PROVENANCE_FILE if output.is_dir() else Path(beside_name(str(output)))


def beside_name(output: str) -> str:
    """Return the name of the statement about an output that is one file."""
    return f"{output}.{PROVENANCE_FILE}"


def statement_beside(file: Path) -> tuple[Path, ...]:
    """Return where the statement about a file may lie: beside it, in its folder, or above that."""
    folders = (file.parent, file.parent.parent)
    return Path(beside_name(os.fspath(file))), *(f / PROVENANCE_FILE for f in folders)


def load_statement(path: Path) -> dict[str, Any]:
    """Read a statement of ours; its paths of inputs become absolute.

    Raises:
        MissingFileError: nothing lies there.
        AdapterError: it is no sound statement, or another tool's.
    """
    found = parsed_statement(read_small_file(path, MOST_STATEMENT_BYTES), path)
    predicate = found["predicate"]
    target = path.parent if path.name == PROVENANCE_FILE else path
    return {**found, "predicate": _absolute(predicate, _home(target))}


def parsed_statement(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a statement of ours from its bytes; whoever reads it may rely on its form.

    Args:
        data: UTF-8 JSON.
        path: where it was, for messages.

    Raises:
        AdapterError: it is no sound statement, or another tool's.
    """
    found = parsed_object(data, "statement", path=path, max_depth=_MOST_DEPTH)
    if found.get("predicateType") != PREDICATE_TYPE or "predicate" not in found:
        raise AdapterError(
            "not a statement of loratools",
            path=path,
            got=found.get("predicateType"),
            expected=PREDICATE_TYPE,
        )
    named: dict[str, Any] = _with_names(found)
    flaw = _flaw(named)
    if flaw is not None:
        raise AdapterError(
            f"the statement is malformed: {flaw} has another form than ours", path=path
        )
    return named


def _with_names(value: Any) -> Any:
    """Return a value with the names of files as Python has them, bytes that are no UTF-8 too."""
    if isinstance(value, list):
        return [_with_names(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _with_names(item) for key, item in value.items()}
    for key in ("name", "path"):
        if isinstance(found.get(key), str):
            found[key] = _TOLD_BYTE.sub(lambda told: chr(int(told[1], 16)), found[key])
    return found


def is_sound(value: Any) -> bool:
    """Return whether a value that a statement carries has the form of a statement."""
    return isinstance(value, dict) and _flaw(value) is None


def _flaw(statement: Mapping[str, Any]) -> str | None:
    """Return which part has another form than ours have; None if none has."""
    subject = statement.get("subject")
    if not _are_files(subject):
        return "the list of subjects"
    if not all(_is_inside(one.get("name", "")) for one in _as_list(subject)):
        return "the name of a subject"
    return _flaw_of_predicate(statement.get("predicate"))


def _flaw_of_predicate(predicate: Any) -> str | None:
    if not isinstance(predicate, dict):
        return "the predicate"
    call = predicate.get("call", {})
    forms: list[tuple[dict[str, Any], str, type]] = []
    forms += [(predicate, name, dict) for name in ("tool", "options", "environment", "steps")]
    forms += [(predicate, "history", list), (predicate, "call", dict)]
    if isinstance(call, dict):
        forms += [(call, name, dict) for name in ("arguments", "options")]
    for values, name, form in forms:
        if not isinstance(values.get(name, form()), form):
            return name
    if not _are_files(predicate.get("inputs", [])):
        return "inputs"
    given = call.get("arguments", {}).values()
    if not all(_is_given(one) for each in given for one in _as_list(each)):
        return "arguments"
    return next(filter(None, map(_flaw_of_predicate, predicate.get("steps", {}).values())), None)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_given(value: Any) -> bool:
    """Return whether a value may be what a call was given: a path with what it was for."""
    if not isinstance(value, dict):
        return False
    roles = value.get("roles", [])
    return isinstance(roles, list) and all(isinstance(role, str) for role in roles)


def _are_files(value: Any) -> bool:
    """Return whether a value is a list of files with their digests."""
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and all(isinstance(one.get(key, ""), str) for key in ("name", "role"))
        and isinstance(one.get("digest", {}), dict)
        and all(isinstance(digest, str) for digest in one.get("digest", {}).values())
        for one in value
    )


def _is_inside(name: str) -> bool:
    """Return whether a name is of a file in the folder of an output."""
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def read_statement(path: Path) -> dict[str, Any] | None:
    """Return a statement of ours; None if none lies there, or one that is not sound.

    Raises:
        AdapterError: the system failed to read it, so that nobody knows what lies there.
    """
    if not os.path.lexists(path):
        return None
    try:
        return load_statement(path)
    except LoratoolsError as error:
        if is_trouble(error):
            raise
        return None


def _absolute(value: Any, home: Path) -> Any:
    if isinstance(value, dict):
        found = {key: _absolute(item, home) for key, item in value.items()}
        if isinstance(found.get("path"), str) and "roles" in found:
            found["path"] = os.path.normpath(home / found["path"])
        return found
    return [_absolute(item, home) for item in value] if isinstance(value, list) else value


def start_digest(path: Path, nbytes: int) -> dict[str, str]:
    """Return a digest of a file's first bytes, which are its header, and the file's size."""
    file = RegularFile(path)
    try:
        digest = hashlib.sha256(file.read_at(0, nbytes)).hexdigest()
        return {"headerSha256": digest, "bytes": str(file.nbytes)}
    finally:
        file.close()


def sha256_of(path: Path) -> str:
    """Digest of a regular file, as lower-case hex."""
    file = RegularFile(path)
    try:
        return file.sha256()
    finally:
        file.close()
