"""Opening files that may be hostile; their content does not matter here.

A path may be a FIFO (opening it would block for ever), a device (it never ends), a symlink out of
the folder, or may change while it is read. So: open without blocking, take regular files only,
keep the descriptor, read with `pread` (never `mmap`: truncation would kill the process), and
compare the file's identity at the end.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loratools_formats.disk.errors import AdapterError, MissingFileError

_HASH_CHUNK_BYTES = 1 << 20
_COPY_CHUNK_BYTES = 1 << 20
_NO_KERNEL_COPY = (
    errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF, errno.EPERM,
)  # fmt: skip


_TROUBLES = {
    errno.EIO, errno.ENOSPC, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR,
    errno.ETIMEDOUT, getattr(errno, "ESTALE", errno.EIO),
}  # fmt: skip
_WATCHED = threading.local()


@contextlib.contextmanager
def system_troubles() -> Iterator[list[str]]:
    """Yield a list that gets what kept this thread from reading without being a file's fault.

    Whoever asks whether a file is as it should be catches the errors of those that are not. A disk
    that fails, or too many open files, says nothing of the file, whatever caught the error.
    """
    outer = getattr(_WATCHED, "troubles", None)
    _WATCHED.troubles = found = list[str]()
    try:
        yield found
    finally:
        _WATCHED.troubles = outer


def is_trouble(error: Exception) -> bool:
    """Return whether an error says nothing of a file, since the system kept it from being read."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _TROUBLES


def _unread(what: str, path: str | os.PathLike[str], error: OSError) -> AdapterError:
    told = AdapterError(f"{what}: {error.strerror}", path=path)
    troubles = getattr(_WATCHED, "troubles", None)
    if troubles is not None and error.errno in _TROUBLES:
        troubles.append(str(told))
    return told


@dataclass(frozen=True)
class Identity:
    """What tells a file from another, and from itself after a change."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """Return what a file's status tells."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class RegularFile:
    """A regular file held open for positioned reads; safe to share between threads.

    Args:
        path: the file; symlinks are followed.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: it is not a regular file, or may not be read.
    """

    _fd = -1  # of one whose making a signal interrupted, too

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
        flags |= getattr(os, "O_BINARY", 0)
        try:
            self._fd = os.open(path, flags)
        except FileNotFoundError as error:
            raise MissingFileError("no such file", path=path) from error
        except ValueError as error:  # a NUL byte in the name
            raise MissingFileError("not a possible file name", path=path) from error
        except OSError as error:
            if os.path.isdir(path):
                raise AdapterError("is a directory, not a file", path=path) from error
            raise _unread("cannot be opened", path, error) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise AdapterError(f"is {kind}, not a regular file", path=path)
        self._identity = Identity.of(status)

    @property
    def identity(self) -> Identity:
        """Which file it was, and in which state, when it was opened."""
        return self._identity

    @property
    def is_here(self) -> bool:
        """Whether its bytes are on this machine."""
        return True

    @property
    def nbytes(self) -> int:
        """Size in bytes when the file was opened."""
        return self._identity.nbytes

    def fileno(self) -> int:
        """Return the descriptor, to hand on to a child process."""
        return self._fd

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Read exactly `nbytes` bytes from `offset`.

        Raises:
            AdapterError: the file ends earlier: it was truncated while open.
        """
        data = self._read_some(offset, nbytes)
        if len(data) == nbytes:
            return data
        parts, done = [data], len(data)
        while done < nbytes:
            part = self._read_some(offset + done, nbytes - done)
            if not part:
                raise AdapterError(
                    "file ended while it was being read", path=self.path, got=offset + done
                )
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def _read_some(self, offset: int, nbytes: int) -> bytes:
        try:
            return read_some(self._fd, offset, nbytes)
        except OSError as error:
            raise _unread("cannot be read", self.path, error) from error

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill a buffer of bytes from `offset`; spares the memory of `read_at`.

        Raises:
            AdapterError: the file ends earlier.
        """
        done = 0
        while hasattr(os, "preadv") and done < len(out):
            try:
                count = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                raise _unread("cannot be read", self.path, error) from error
            if count == 0:
                break  # read_at says what is wrong
            done += count
        if done < len(out):
            out[done:] = self.read_at(offset + done, len(out) - done)

    def copy_at(self, offset: int, nbytes: int, out: int, out_offset: int) -> None:
        """Copy bytes to an open file, inside the kernel where the systems can do that.

        Args:
            offset: where to begin here.
            nbytes: how many.
            out: descriptor to write to; its position stays.
            out_offset: where to begin there.

        Raises:
            AdapterError: this file ends earlier.
            OSError: writing failed.
        """
        done = _copied_in_kernel(self._fd, offset, nbytes, out, out_offset)
        while done < nbytes:
            view = memoryview(self.read_at(offset + done, min(_COPY_CHUNK_BYTES, nbytes - done)))
            write_at(out, out_offset + done, view)
            done += len(view)

    def check_unchanged(self) -> None:
        """Raise `AdapterError` if the file was written to since it was opened."""
        if Identity.of(os.fstat(self._fd)) != self._identity:
            raise AdapterError("file changed while it was being read", path=self.path)

    def check_in_place(self) -> None:
        """Raise `AdapterError` also if its name leads to another file by now, or to none."""
        self.check_unchanged()
        try:
            now = Identity.of(os.stat(self.path))
        except OSError as error:
            raise AdapterError(
                f"file went away while it was in use: {error.strerror}", path=self.path
            ) from error
        if now != self._identity:
            raise AdapterError("file was replaced while it was in use", path=self.path)

    def sha256(self) -> str:
        """Digest of the whole file, as lower-case hex."""
        digest = hashlib.sha256()
        for offset in range(0, self.nbytes, _HASH_CHUNK_BYTES):
            digest.update(self.read_at(offset, min(_HASH_CHUNK_BYTES, self.nbytes - offset)))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the descriptor; later reads fail."""
        descriptor, self._fd = self._fd, -1  # first: a signal may come after the system closed it
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


_POSITION = threading.Lock()
"""Held while a descriptor's position is set and used, where the system cannot do both at once."""


def create(path: Path) -> int:
    """Return a descriptor of a new file to write to at any place, and to read.

    Raises:
        OSError: it exists, or cannot be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)


def copy_whole(source: Path, target: Path) -> None:
    """Copy a regular file to a new one, as it is at one moment.

    Raises:
        AdapterError: the source is no regular file, or changed meanwhile.
        OSError: the target exists, or cannot be written.
    """
    given = RegularFile(source)
    try:
        descriptor = create(target)
        try:
            given.copy_at(0, given.nbytes, descriptor, 0)
        finally:
            os.close(descriptor)
        given.check_unchanged()
    finally:
        given.close()


def read_some(fd: int, offset: int, nbytes: int) -> bytes:
    """Read up to a number of bytes at an offset; as safe between threads as `os.pread`.

    Raises:
        OSError: reading failed.
    """
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


def write_at(fd: int, offset: int, data: memoryview) -> None:
    """Write all bytes at an offset; as safe between threads as `os.pwrite`, which Windows lacks.

    Raises:
        OSError: writing failed.
    """
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(fd, data, offset)
        else:
            with _POSITION:
                os.lseek(fd, offset, os.SEEK_SET)
                written = os.write(fd, data)
        data, offset = data[written:], offset + written


def _copied_in_kernel(fd: int, offset: int, nbytes: int, out: int, out_offset: int) -> int:
    """Copy with `copy_file_range` as far as it goes; returns the number of bytes copied."""
    done = 0
    while hasattr(os, "copy_file_range") and done < nbytes:
        try:
            count = os.copy_file_range(fd, out, nbytes - done, offset + done, out_offset + done)
        except OSError as error:
            if error.errno in _NO_KERNEL_COPY:
                return done
            raise
        if count == 0:  # the end of the source, or a file system that cannot do it
            return done
        done += count
    return done


def read_small_file(given: str | os.PathLike[str] | RegularFile, limit_bytes: int) -> bytes:
    """Read a whole regular file of at most `limit_bytes`.

    Args:
        given: where it is; or the file itself, if what was read must be what is digested later.
        limit_bytes: the largest that it may be.

    Raises:
        AdapterError: it is larger, or not a regular file.
    """
    file = given if isinstance(given, RegularFile) else RegularFile(given)
    try:
        if file.nbytes > limit_bytes:
            raise AdapterError(
                "file is too large",
                path=file.path,
                got=f"{file.nbytes} bytes",
                expected=f"at most {limit_bytes}",
            )
        return bytes(file.read_at(0, file.nbytes))
    finally:
        if file is not given:
            file.close()


def inside(folder: Path, name: str) -> Path:
    """Return `folder/name`, refusing a symlink that leads out of the folder.

    The Hugging Face cache links `models--*/snapshots/<rev>/<file>` to `models--*/blobs/<hash>`;
    that is allowed, since both lie below the same `models--*` folder.

    Raises:
        AdapterError: the link leads elsewhere, or no file can have the name.
    """
    path = folder / name
    try:
        if not path.is_symlink():
            return path
    except (OSError, ValueError) as error:  # too long, or with a NUL byte
        text = getattr(error, "strerror", None) or str(error)
        raise AdapterError(f"not a possible file name: {text}", path=path) from error
    target = Path(os.path.realpath(path))
    roots = [Path(os.path.realpath(folder))]
    roots += [p for p in roots[0].parents if p.name.startswith(("models--", "datasets--"))]
    if not any(target.is_relative_to(root) for root in roots):
        raise AdapterError(
            "symbolic link leads out of its folder",
            path=path,
            got=target,
            hint="Copy the file into the folder if you trust it",
        )
    return path


def is_closed(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder that this process may not look into."""
    return os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK)
