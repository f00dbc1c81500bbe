"""What is published of each file, fixed before anything is sent.

Files may change while an adapter is read, checked and sent. What is sent must be what was read, so
the states of all files are noted before the first is read, and compared when their digests are
taken. From then on a digest, or the bytes themselves, say what is published.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import Identity, RegularFile

_CHUNK_BYTES = 1 << 20
_MOST_BYTES_IN_MEMORY = 1 << 20


@dataclass(frozen=True)
class Content:
    """What is published of one file.

    Attributes:
        data: the bytes; or a large file, which is another one if its digest differs.
        nbytes: how many bytes.
        sha256: their digest, by which the Hub knows large files.
        git: git's name of them, by which it knows small ones.
    """

    data: bytes | Path
    nbytes: int
    sha256: str
    git: str

    @classmethod
    def of_bytes(cls, data: bytes) -> Content:
        """Return content that is in memory."""
        return cls._of(data, len(data), iter([data]))

    @classmethod
    def of_file(cls, path: Path, known: Identity | None = None) -> Content:
        """Return the content of a file; that of a small one is kept in memory.

        Args:
            path: the file.
            known: the state that it must have; None for the one that it has.

        Raises:
            AdapterError: it cannot be read, has another state, or changed meanwhile.
        """
        file = RegularFile(path)
        try:
            if known not in (None, file.identity):
                raise AdapterError("file changed while it was being published", path=path)
            if file.nbytes <= _MOST_BYTES_IN_MEMORY:
                found = cls.of_bytes(bytes(file.read_at(0, file.nbytes)))
            else:
                found = cls._of(path, file.nbytes, _chunks(file))
            file.check_in_place()
        finally:
            file.close()
        return found

    @classmethod
    def _of(cls, data: bytes | Path, nbytes: int, chunks: Iterator[bytes]) -> Content:
        sha256 = hashlib.sha256()
        git = hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
        for chunk in chunks:
            sha256.update(chunk)
            git.update(chunk)
        return cls(data, nbytes, sha256.hexdigest(), git.hexdigest())

    def is_at(self, mark: str | None) -> bool:
        """Return whether the Hub has this content where it tells such a mark."""
        return mark in (self.sha256, self.git)


def _chunks(file: RegularFile) -> Iterator[bytes]:
    for offset in range(0, file.nbytes, _CHUNK_BYTES):
        yield bytes(file.read_at(offset, min(_CHUNK_BYTES, file.nbytes - offset)))


class Watched:
    """The states of all files at a path, and beside it if it is a file, before any is read."""

    def __init__(self, path: Path) -> None:
        self._known: dict[str, Identity] = {}
        folder = path if path.is_dir() else path.parent
        for place, folders, names in os.walk(folder):
            for name in names:
                # One that went away, or leads nowhere, is missed by whoever wants it.
                with contextlib.suppress(OSError):
                    file = os.path.join(place, name)
                    self._known[os.path.abspath(file)] = Identity.of(os.stat(file))
            if folder is not path:
                folders.clear()

    def content(self, path: Path) -> Content:
        """Return the content of one of them.

        Raises:
            AdapterError: the file has changed since, or appeared.
        """
        known = self._known.get(os.path.abspath(path))
        if known is None:
            raise AdapterError("file appeared while its folder was being published", path=path)
        return Content.of_file(path, known)
