"""A lock of a folder, for the steps in which an output and the files beside it change places."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_MOST_SECONDS = 10.0
_PAUSE_SECONDS = 0.005


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads of ours out of the same steps in a folder meanwhile.

    A process that ends in any way lets go of it. Where folders cannot be locked, or another process
    keeps the lock for ten seconds, the work goes on without.
    """
    descriptor = _locked(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(folder: Path) -> int | None:
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    taken = False
    try:
        taken = _taken(descriptor)
    finally:
        if not taken:
            os.close(descriptor)
    return descriptor if taken else None


def _taken(descriptor: int) -> bool:
    if sys.platform == "win32":
        return False
    try:
        import fcntl
    except ImportError:
        return False
    end = time.monotonic() + _MOST_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(_PAUSE_SECONDS)
        except OSError:
            return False
        else:
            return True
