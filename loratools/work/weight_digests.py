"""Digests of base weights, each file hashed once.

An operation that reads a base records the sha256 of every weight file whole, so that a base and
the model tuned from it differ though their headers are equal. Hashing 1 GB takes more than half a
second, and bases do not change: what was found is kept in a folder of the user's, by the file's
device, inode, size and time of change. Adapters are small; `RegularFile.sha256` hashes those.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from loratools.work.parallel import usable_cores
from loratools_formats.disk.files import RegularFile

_BLOB = re.compile(r"[0-9a-f]{64}")
_UNSETTLED_NS = 2_000_000_000
"""A file written to this lately may be written to again without a new time of change."""


def cache_folder() -> Path:
    """Return where digests are kept: `LORATOOLS_CACHE`, or `loratools` in the user's cache."""
    own = os.environ.get("LORATOOLS_CACHE")
    if own:
        return Path(own)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "loratools"


def weight_digests(files: Sequence[RegularFile]) -> list[str]:
    """Return the sha256 of each file, as lower-case hex; several are hashed side by side.

    It may run beside the work itself, and so leaves the number of BLAS threads alone: that is one
    for the whole process while work is done, on which the order of every sum depends.

    Raises:
        AdapterError: one cannot be read, or changed meanwhile.
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(_digest_of, files))


def _digest_of(file: RegularFile) -> str:
    place = _place_of(file)
    kept = None if place is None else _read(place)
    if kept is not None:
        return kept
    digest = file.sha256()
    file.check_unchanged()
    if place is not None:
        _keep(place, digest)
    return digest


def _place_of(file: RegularFile) -> Path | None:
    """Return the file that keeps a digest; None if the weights may still be being written."""
    identity = file.identity
    if time.time_ns() - identity.mtime_ns < _UNSETTLED_NS:
        return None
    name = hashlib.sha256(repr(identity).encode()).hexdigest()
    return cache_folder() / "digests" / name


def _read(place: Path) -> str | None:
    try:
        text = place.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if _BLOB.fullmatch(text) else None


def _keep(place: Path, digest: str) -> None:
    """Keep a digest for the next run; where nothing can be written, that run hashes again."""
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=place.parent)
        with os.fdopen(descriptor, "w", encoding="ascii") as out:
            out.write(digest)
        os.replace(temporary, place)
