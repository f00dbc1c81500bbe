"""Memory that a process keeps for its next array, in place of giving it back and asking again.

glibc gives memory back to the system whenever much of it is free at the end, and the system clears
each page that it hands out again. A command makes and drops arrays of some megabytes for every
module, which cost it a fifth of its processor time; a worker of Dask's, which is told to give back
all but 64 KiB, took three times as long. Elsewhere than with glibc nothing is changed; nor is it in
processes that only import this library, whose memory is theirs.
"""

from __future__ import annotations

import contextlib
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # names of glibc's malloc.h
_KEPT_BYTES = 64 << 20
_OWN_MAPPING_BYTES = 8 << 20


def keep_memory() -> None:
    """Keep up to 64 MiB that are free, and reuse them for arrays below 8 MiB, in any thread.

    Threads would keep as much each otherwise.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # of a library that is not glibc
        change = ctypes.CDLL(None).mallopt
        change(_TRIM_THRESHOLD, _KEPT_BYTES)
        change(_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
        change(_ARENA_MAX, 1)
