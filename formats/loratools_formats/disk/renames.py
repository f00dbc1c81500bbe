"""Renames that replace nothing, and those that exchange two names, in one step where possible."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import sys
from pathlib import Path

from loratools_formats.disk.errors import OutputExistsError

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2  # of Linux' renameat2
_EXCLUSIVE = 4  # of Apple's renamex_np
_NOT_THERE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)


def rename_new(temporary: Path, target: Path) -> None:
    """Rename a file or folder to a name that nothing has.

    Where neither the system nor the file system can do that in one step, what appears between the
    last look and the rename is replaced.

    Raises:
        FileExistsError: something has the name.
        OSError: the system refused.
    """
    if os.name == "nt":
        os.rename(temporary, target)  # refuses a name that is taken
        return
    if _renamed(temporary, target, _NOREPLACE, _EXCLUSIVE):
        return
    if not temporary.is_dir():
        try:
            os.link(temporary, target, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in (*_NOT_THERE, errno.EMLINK):
                raise
        else:
            with contextlib.suppress(OSError):  # the output is there; the next run sweeps
                unlink(temporary)
            return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(temporary, target)


def take_new_name(temporary: Path, target: Path, path: str | os.PathLike[str]) -> None:
    """Rename a file or folder to a name that nothing has.

    Args:
        temporary: what is renamed.
        target: the name.
        path: what the user calls it.

    Raises:
        OutputExistsError: something has the name.
        OSError: the system refused.
    """
    try:
        rename_new(temporary, target)
    except FileExistsError as error:
        raise appeared(path) from error


def has_become(temporary: Path, target: Path) -> bool:
    """Return whether a temporary that was written has its new name, which may be its second."""
    try:
        return os.path.samestat(os.lstat(temporary), os.lstat(target))
    except FileNotFoundError:
        return not os.path.lexists(temporary)


def appeared(path: str | os.PathLike[str]) -> OutputExistsError:
    """Return the error of an output that was not there when the work began."""
    return OutputExistsError(
        "output appeared while it was being made",
        path=path,
        hint="Pass `overwrite=True` to replace it",
    )


def unlink(path: Path) -> None:
    """Remove a file; once more if the call failed, for what is temporary must not stay.

    Raises:
        OSError: the system refused.
    """
    try:
        os.unlink(path)
    except OSError:
        os.unlink(path)


def exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step where the system can; False where not."""
    try:
        return _renamed(first, second, _EXCHANGE, None)
    except OSError:
        return False


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _renamed(first: Path, second: Path, linux: int, apple: int | None) -> bool:
    """Rename with flags; False where the system or the file system does not know them.

    Raises:
        OSError: the system refused.
    """
    library = _library()
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform.startswith("linux") and hasattr(library, "renameat2"):
        status = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], linux)
    elif sys.platform == "darwin" and apple is not None and hasattr(library, "renamex_np"):
        status = library.renamex_np(names[0], names[1], apple)
    else:
        return False
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(second))
