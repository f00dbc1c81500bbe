"""Making outputs appear whole or not at all.

A file or folder is built under a temporary name beside its destination, flushed to the disk,
checked by its maker, then renamed. Whoever looks sees the old output or the new one. A killed
process leaves at most a temporary named `.<name>.loratools-<pid>-<random>`, which the next write
to the same destination removes once that process is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from loratools_formats.disk.errors import LoratoolsError, OutputError, OutputExistsError

_MARK = ".loratools-"
_OLD = ".old"
_NAME_LIMIT_BYTES = 255
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def resolved(path: str | os.PathLike[str]) -> Path:
    """Return where an output named `path` will lie: links are followed, so that they survive.

    Raises:
        OutputError: no file can have that name.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a NUL byte in the name
        raise OutputError(f"not a possible file name: {error}", path=path) from error


@contextlib.contextmanager
def publish_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path; on success flush it and rename it to `path`.

    The caller creates the file under the yielded path, with any permissions: an existing file's are
    kept, and a new file gets those that the umask and the folder leave.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, or it is a folder.
        OutputError: the system refused a step; what stood at `path` is intact.
    """
    target = resolved(path)
    old_mode = _check_target(path, target, overwrite, folder=False)
    temporary = _temporary_beside(target)
    with _os_errors_named(path):
        mode = _mode_of_new_file(temporary) if old_mode is None else old_mode
        try:
            yield temporary
            os.chmod(temporary, mode)
            sync_file(temporary)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    _make_durable(path, target)


@contextlib.contextmanager
def publish_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; on success flush its files and rename it to `path`.

    An existing folder is exchanged with the new one in one step where the system can do that.
    Elsewhere it is moved aside first, and a kill between the two renames leaves it beside the
    destination under a name ending in `.old`, which is never removed automatically.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, or it is a file.
        OutputError: the system refused a step; what stood at `path` is intact.
    """
    target = resolved(path)
    old_mode = _check_target(path, target, overwrite, folder=True)
    temporary = _temporary_beside(target)
    with _os_errors_named(path):
        try:
            temporary.mkdir()
            yield temporary
            if old_mode is not None:
                os.chmod(temporary, old_mode)
            for root, _, names in os.walk(temporary):
                for name in names:
                    sync_file(Path(root) / name)
                _sync_folder(Path(root))
            _swap_folder(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _make_durable(path, target)


def _make_durable(path: str | os.PathLike[str], target: Path) -> None:
    try:
        _sync_folder(target.parent)
    except OSError as error:
        raise OutputError(
            f"the output is in place, but the folder it is in cannot be flushed: {error.strerror}",
            path=path,
            hint="A power failure may undo it",
        ) from error


def _content(folder: Path) -> set[str]:
    """Return everything below a folder, as paths relative to it."""
    return {
        os.path.relpath(os.path.join(root, name), folder)
        for root, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def _swap_folder(temporary: Path, target: Path) -> None:
    """Put `temporary` in the place of `target`, and remove what was there."""
    if not target.exists():
        os.rename(temporary, target)
        return
    foreign = sorted(_content(target) - _content(temporary))
    if foreign:
        raise OutputExistsError(
            "replacing this folder would lose files",
            path=target,
            got=", ".join(foreign[:5]),
            hint="Move them away or choose another output",
        )
    if _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    aside = target.parent / f"{temporary.name}{_OLD}"
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step where the system can (renameat2, Linux); False where not."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    status: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return status == 0


def _mode_of_new_file(path: Path) -> int:
    """Return the permissions of a file created there, which is removed again.

    The process' umask can be read only by changing it, which other threads would notice.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        os.unlink(path)


def _check_target(
    path: str | os.PathLike[str], target: Path, overwrite: bool, *, folder: bool
) -> int | None:
    """Return the permissions of the file to be replaced; None if there is none."""
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise OutputError(
                "the folder to write into does not exist", path=target.parent
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write there: {error}", path=path) from error
    if stat.S_ISDIR(status.st_mode) != folder or not (
        stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
    ):
        wanted = "folder" if folder else "file"
        raise OutputExistsError(
            f"exists and is not a {wanted}", path=path, hint="Choose another output"
        )
    if not overwrite:
        raise OutputExistsError(
            "output exists", path=path, hint="Pass `overwrite=True` to replace it"
        )
    return stat.S_IMODE(status.st_mode)


def _temporary_beside(target: Path) -> Path:
    suffix = f"{_MARK}{os.getpid()}-{secrets.token_hex(4)}"
    stem = os.fsdecode(b"." + os.fsencode(target.name)[: _NAME_LIMIT_BYTES - len(suffix) - 6])
    _remove_stale(target.parent, stem)
    return target.parent / f"{stem}{suffix}"


def _remove_stale(folder: Path, stem: str) -> None:
    pattern = re.compile(rf"{re.escape(stem + _MARK)}(\d+)-[0-9a-f]{{8}}")
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise OutputError(f"cannot write there: {error.strerror}", path=folder) from error
    for entry in entries:
        match = pattern.fullmatch(entry.name)
        if match is None or _is_running(int(match[1])):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(entry.path)


def _is_running(pid: int) -> bool:
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _os_errors_named(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except LoratoolsError:
        raise
    except OSError as error:
        raise OutputError(
            f"writing failed: {error.strerror or error}",
            path=path,
            hint="Nothing was changed; check free space and permissions",
        ) from error
