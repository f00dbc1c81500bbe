"""The record of how an output was made, kept beside it.

An in-toto Statement, version 1: plain JSON that says which files (by digest) came from which
inputs (by digest) through which operation, so that it can be checked, repeated, or signed later
by other tools. It holds no time and no local paths, so equal runs give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools_formats.disk import strict_json
from loratools_formats.disk.files import RegularFile

PROVENANCE_FILE = "provenance.json"
PREDICATE_TYPE = "urn:loratools:operation:v1"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
MADE_HERE = b"# Made by loratools."
"""How a text file of ours begins that lies beside an output."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def statement(
    predicate: Mapping[str, Any],
    files: Iterable[Path],
    digest: Callable[[Path], Mapping[str, str]] | None = None,
    folder: Path | None = None,
) -> bytes:
    """Return the statement that `files` were made as `predicate` says, as UTF-8 JSON.

    Source: https://github.com/in-toto/attestation, spec/v1/statement.md.

    Args:
        predicate: how they were made.
        files: the files.
        digest: what to say of each; its sha256 by default.
        folder: what they are named relative to; None for their names alone.
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
        "predicate": predicate,
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
    return statement(predicate, [path], lambda _: describe(file))


def sha256_of(path: Path) -> str:
    """Digest of a regular file, as lower-case hex."""
    file = RegularFile(path)
    try:
        return file.sha256()
    finally:
        file.close()
