"""Reading the files of a folder that another program may replace meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from loratools_formats.disk.errors import AdapterError, LoratoolsError

T = TypeVar("T")
_MOST_TRIES = 10


def of_one_folder(path: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """Return what a function reads of a path; if that is a folder, all of the same one.

    Between two of its files, another folder may come in its place: the configuration of one with
    the weights of the other would be a change that nobody trained. The folder is then read again.

    Args:
        path: of the folder, or of anything else.
        read: reads its files, or opens those that are read later.

    Raises:
        AdapterError: the folder was replaced each time.
        LoratoolsError: what `read` raises of a folder that stayed.
    """
    for _ in range(_MOST_TRIES):
        before = _state(path)
        try:
            found = read()
        except LoratoolsError:
            if _state(path) == before:
                raise
            continue
        if _state(path) == before:
            return found
    raise AdapterError(
        "changes again and again while it is read",
        path=path,
        hint="Read it when no other program writes it",
    )


def _state(path: str | os.PathLike[str]) -> tuple[int, ...] | None:
    """Return what differs once a folder, or a file in it, was replaced; None for no folder."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not os.path.isdir(path):
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_mtime_ns
