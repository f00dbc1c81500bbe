"""Room for many open files: every adapter that takes part keeps one open.

Systems start processes with a soft limit, often 1,024 files, below the hard one.
"""

from __future__ import annotations

import contextlib
import os

_OTHERS = 128  # libraries, scratch files, outputs


def allow_open_files(count: int) -> None:
    """Raise the soft limit of open files as far as `count` adapters need and the system allows."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Weights, and pickles or configurations that stay open, beside what this process has open.
    wanted = 2 * count + _OTHERS + _open_now()
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _open_now() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return 0
