"""Files that are elsewhere: known by their first bytes and their size, fetched whole when read on.

Whoever knows of one announces it under the path that it will have. What only looks at headers then
costs kilobytes, and what reads tensors fetches the files that hold them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import RegularFile

_MOST_PARTS, _LONGEST_PART = 4, 1 << 16
_ANNOUNCED: dict[str, Callable[[], RegularFile]] = {}


class DistantFile(RegularFile):
    """A regular file of which only the start is here until more is read.

    Args:
        path: where it will be.
        start: its first bytes.
        nbytes: its size.
        fetch: brings it here, and returns its path.
        part: returns some bytes of it (offset, count), for the first few and short reads; None to
            fetch it for them too.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        start: bytes,
        nbytes: int,
        fetch: Callable[[], Path],
        part: Callable[[int, int], bytes] | None = None,
    ) -> None:
        self._fd = -1
        self.path = Path(path)
        self._start, self._nbytes, self._fetch = start, nbytes, fetch
        self._fetching = threading.Lock()
        self._here = False
        self._part, self._parts_left = part, _MOST_PARTS

    @property
    def is_here(self) -> bool:
        """Whether it was fetched."""
        return self._here

    @property
    def nbytes(self) -> int:
        """Size in bytes, as it was announced."""
        return self._nbytes

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Read exactly `nbytes` bytes from `offset`; fetch the file if its start does not do.

        Raises:
            AdapterError: the file ends earlier, or is not the one that was announced.
            LoratoolsError: it could not be fetched.
        """
        if not self._here and offset + nbytes <= len(self._start):
            return self._start[offset : offset + nbytes]
        if not self._here and self._part and self._parts_left and nbytes <= _LONGEST_PART:
            self._parts_left -= 1
            return self._part(offset, nbytes)
        self.bring()
        return super().read_at(offset, nbytes)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill a buffer of bytes from `offset`; raises as `read_at`."""
        self.bring()
        super().read_into(offset, out)

    def copy_at(self, offset: int, nbytes: int, out: int, out_offset: int) -> None:
        """Copy bytes to an open file; raises as `read_at`."""
        self.bring()
        super().copy_at(offset, nbytes, out, out_offset)

    def check_unchanged(self) -> None:
        """Raise `AdapterError` if the file was written to since it was fetched."""
        if self._here:
            super().check_unchanged()

    def bring(self) -> None:
        """Fetch the file, if it is not here.

        Raises:
            AdapterError: it is not the one that was announced.
            LoratoolsError: it could not be fetched.
        """
        with self._fetching:
            if self._here:
                return
            super().__init__(self._fetch())
            found = super().read_at(0, min(len(self._start), self._identity.nbytes))
            if self._identity.nbytes != self._nbytes or found != self._start:
                raise AdapterError("the fetched file is not the one announced", path=self.path)
            self._here = True


def announce(path: str | os.PathLike[str], opener: Callable[[], RegularFile]) -> None:
    """Say that a file which is not at `path` can be opened all the same."""
    _ANNOUNCED[os.path.abspath(path)] = opener


def withdraw(path: str | os.PathLike[str]) -> None:
    """Take back what was said of a file; one that is open stays so."""
    _ANNOUNCED.pop(os.path.abspath(path), None)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is at `path`, or was announced for it."""
    return os.path.exists(path) or os.path.abspath(path) in _ANNOUNCED


def is_distant(path: str | os.PathLike[str]) -> bool:
    """Return whether nothing is at `path`, and a file was announced for it."""
    return not os.path.exists(path) and os.path.abspath(path) in _ANNOUNCED


def announced_below(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files that are elsewhere and were announced for a path, or in its folder."""
    place = os.path.abspath(path)
    below = os.path.join(place, "")
    return [
        Path(name)
        for name in tuple(_ANNOUNCED)
        if (name == place or name.startswith(below)) and not os.path.exists(name)
    ]


def has_distant(path: str | os.PathLike[str]) -> bool:
    """Return whether a path, or a file in the folder that it is, is elsewhere and was announced."""
    return bool(announced_below(path))


def open_file(path: str | os.PathLike[str]) -> RegularFile:
    """Open a file that is there, or was announced.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: it is not a regular file, or may not be read.
        LoratoolsError: the start of a distant file could not be fetched.
    """
    opener = _ANNOUNCED.get(os.path.abspath(path)) if not os.path.lexists(path) else None
    return RegularFile(path) if opener is None else opener()
