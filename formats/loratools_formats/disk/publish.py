"""Making outputs appear whole or not at all.

A file or folder is built under a temporary name beside its destination, flushed to the disk,
checked by its maker, then renamed: over nothing, unless what is there may be replaced. Whoever
looks sees the old output or the new one. Files that belong beside an output that is one file are
part of it: they are checked before any work, and made before the rename. Two names cannot change at
once, so the old ones go before it, and the new ones get their places after it: an output never lies
beside the statement of another. A killed process leaves at most temporaries, which `temporaries`
describes, and an output without its statement until the next run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from loratools_formats.disk.beside import Beside, check_beside, end_beside
from loratools_formats.disk.errors import LoratoolsError, OutputError, OutputExistsError
from loratools_formats.disk.locks import locked
from loratools_formats.disk.renames import appeared, exchange, has_become, take_new_name, unlink
from loratools_formats.disk.temporaries import is_temporary, temporary_beside

_OLD = ".old"


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
    with publish_with(path, {}, overwrite=overwrite) as (temporary, _):
        yield temporary


@contextlib.contextmanager
def publish_with(
    path: str | os.PathLike[str], beside: Mapping[str, bytes], *, overwrite: bool = False
) -> Iterator[tuple[Path, Mapping[str, bytearray]]]:
    """Yield a temporary path, and what to write beside the output; publish all of it or nothing.

    Inside a folder that is being published itself nothing is flushed: the folder is, at its end.

    Args:
        path: where the output is to be.
        beside: for each file `<path>.<name>`, bytes that every such file of ours holds. A file that
            lacks them is a user's, and is never replaced; nor is a link, a folder or a pipe.
        overwrite: whether an output that exists may be replaced, and what is ours beside it.

    Yields:
        the temporary path, and the content of each file beside the output, which the caller fills;
        what stays empty is not written.

    Raises:
        OutputExistsError: `path`, or a file beside it, exists and may not be replaced.
        OutputError: the system refused a step; what stood there is intact.
    """
    target = resolved(path)
    old_mode = _check_target(path, target, overwrite, folder=False)
    check_beside(path, beside, overwrite=overwrite)
    temporary = temporary_beside(target)
    flushed_later = is_temporary(target.parent)
    contents = {name: bytearray() for name in beside}
    placed: list[Beside] = []
    with _os_errors_named(path), contextlib.ExitStack() as until_the_end:
        try:
            mode = _mode_of_new_file(temporary) if old_mode is None else old_mode
            yield temporary, contents
            os.chmod(temporary, mode)
            if not flushed_later:
                sync_file(temporary)
            for name, content in contents.items():
                place = Path(f"{os.fspath(path)}.{name}")
                placed += [Beside.of(place, bytes(content), temporary)] if content else []
            for one in placed:
                one.write()
            if placed:
                until_the_end.enter_context(locked(target.parent))
                _refuse_appeared(path, target, beside, overwrite)
            for one in placed:
                one.withdraw()
            _take_name(temporary, target, path, overwrite)
            for one in placed:
                one.put()
            end_beside(placed, published=True)
        except BaseException:
            end_beside(placed, published=has_become(temporary, target))
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    if not flushed_later:
        _make_durable(path, target)


def _refuse_appeared(
    path: str | os.PathLike[str], target: Path, beside: Mapping[str, bytes], overwrite: bool
) -> None:
    """Raise `OutputExistsError` of what came since the work began, and may not be replaced."""
    if not overwrite and os.path.lexists(target):
        raise appeared(path)
    check_beside(path, beside, overwrite=overwrite)


def _take_name(
    temporary: Path, target: Path, path: str | os.PathLike[str], overwrite: bool
) -> None:
    if overwrite:
        os.replace(temporary, target)
    else:
        take_new_name(temporary, target, path)


def check_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuse, before any work is done, a file that could not be published later.

    A file is made beside its place for that, and removed again.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is false, or it is no file.
        OutputError: the system refuses the name, or files in its folder.
    """
    target = resolved(path)
    _check_target(path, target, overwrite, folder=False)
    with _os_errors_named(path):
        _mode_of_new_file(temporary_beside(target))


@contextlib.contextmanager
def publish_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; on success flush its files and rename it to `path`.

    An empty folder may stand there. Any other is exchanged with the new one in one step where the
    system can do that. Elsewhere it is moved aside first, and a kill between the two renames leaves
    it beside the destination under a name ending in `.old`, which is never removed automatically.

    Raises:
        OutputExistsError: `path` is a file, or holds something and `overwrite` is false.
        OutputError: the system refused a step; what stood at `path` is intact.
    """
    target = resolved(path)
    old_mode = _check_target(path, target, overwrite, folder=True)
    temporary = temporary_beside(target)
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
            if overwrite:
                _swap_folder(temporary, target)
            elif old_mode is not None:
                _fill_vacant(temporary, target, path)
            else:
                take_new_name(temporary, target, path)
        except BaseException:
            _remove(temporary)
            raise
    _make_durable(path, target)


def is_vacant(path: str | os.PathLike[str]) -> bool:
    """Return whether an empty folder stands there, which an output may take the place of.

    The current folder is none: a shell would be left in a folder that is gone.
    """
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None and not os.path.samefile(path, os.curdir)
    except (OSError, ValueError):
        return False


def _fill_vacant(temporary: Path, target: Path, path: str | os.PathLike[str]) -> None:
    """Put `temporary` in the place of a folder that was empty; refuse if it is empty no more."""
    try:
        if os.name == "nt":  # where a rename replaces no folder
            os.rmdir(target)
        os.rename(temporary, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise appeared(path) from error


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
    if exchange(temporary, target):
        _remove(temporary)
        return
    aside = target.parent / f"{temporary.name}{_OLD}"
    try:
        os.rename(target, aside)
        os.rename(temporary, target)
        _remove(aside)
    except BaseException:
        if not os.path.lexists(target):
            os.rename(aside, target)
        elif not os.path.lexists(temporary):
            _remove(aside)
        raise


def _remove(folder: Path) -> None:
    """Remove a folder of ours; once more if something failed, and else leave it to the next run."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _mode_of_new_file(path: Path) -> int:
    """Return the permissions of a file created there, which is removed again.

    The process' umask can be read only by changing it, which other threads would notice.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        unlink(path)


def _check_target(
    path: str | os.PathLike[str], target: Path, overwrite: bool, *, folder: bool
) -> int | None:
    """Return the permissions of what is to be replaced; None if there is nothing."""
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
    if not overwrite and not is_vacant(target):
        raise OutputExistsError(
            "output exists", path=path, hint="Pass `overwrite=True` to replace it"
        )
    return stat.S_IMODE(status.st_mode)


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
