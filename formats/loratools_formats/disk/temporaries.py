"""Temporary names beside an output, and the removal of those that a killed process left.

A temporary is named `.<name>.loratools-<pid>-<machine><random>`, four hex digits each. Whoever
writes beside it next removes it once its process is gone: under any name if it was made on this
machine since it started, else only one for the output being written, as process numbers of another
machine say nothing here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from loratools_formats.disk.errors import OutputError
from loratools_formats.disk.locks import locked
from loratools_formats.disk.renames import has_become, rename_new

_MARK = ".loratools-"
_NAME_LIMIT_BYTES = 255
_TEMPORARY = re.compile(
    rf"(\..*){re.escape(_MARK)}(\d+)-([0-9a-f]{{4}})([0-9a-f]{{4}})(-new|-old)?", re.DOTALL
)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def temporary_beside(target: Path) -> Path:
    """Return a new name beside an output, after removing what killed processes left there.

    Raises:
        OutputError: the folder cannot be listed.
    """
    suffix = f"{_MARK}{os.getpid()}-{_machine()}{secrets.token_hex(2)}"
    stem = os.fsdecode(b"." + os.fsencode(target.name)[: _NAME_LIMIT_BYTES - len(suffix) - 6])
    _remove_stale(target.parent, stem)
    name = target.parent / f"{stem}{suffix}"
    return temporary_beside(target) if os.path.lexists(name) else name


def marked_beside(place: Path, output: Path, mark: str) -> Path:
    """Return the temporary name of a file that belongs beside an output.

    Where the output gets its name in another folder, or the name is too long, it is one of which
    nothing can be told: the next run removes it.

    Args:
        place: where the file lies, or will.
        output: the temporary name of the output.
        mark: new or old.

    Raises:
        OutputError: the folder cannot be listed.
    """
    match = _TEMPORARY.fullmatch(output.name)
    assert match is not None
    name = f".{place.name}{output.name[len(match[1]) :]}-{mark}"
    is_near = os.path.realpath(place.parent) == os.fspath(output.parent)
    if not is_near or len(os.fsencode(name)) > _NAME_LIMIT_BYTES:
        return temporary_beside(place)
    return place.parent / name


def is_temporary(path: Path) -> bool:
    """Return whether a path has the name of a temporary."""
    return _TEMPORARY.fullmatch(path.name) is not None


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """Yield an empty folder among the system's temporary files, which goes at the end.

    If this process is killed, the next one that wants a folder of the name removes it.

    Args:
        name: what it is for.

    Raises:
        OutputError: it cannot be made.
    """
    place = temporary_beside(Path(tempfile.gettempdir()) / name)
    try:
        place.mkdir(mode=0o700)
    except OSError as error:
        raise OutputError(f"a temporary folder: {error.strerror}", path=place) from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if place.exists():  # once more, if a call was interrupted
            shutil.rmtree(place, ignore_errors=True)


@functools.cache
def _machine() -> str:
    """Return four hex digits of this machine since it started."""
    started = b""
    with contextlib.suppress(OSError):
        started = _BOOT_ID.read_bytes()
    return hashlib.sha256(platform.node().encode() + started).hexdigest()[:4]


def _remove_stale(folder: Path, stem: str) -> None:
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise OutputError(f"cannot write there: {error.strerror}", path=folder) from error
    stale: dict[str, re.Match[str]] = {}
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry.name) if _MARK in entry.name else None
        if match is None or _is_running(int(match[2])):
            continue
        belongs = match[1] == stem or (match[5] and match[1].startswith(f"{stem}."))
        if belongs or match[3] == _machine():
            stale[entry.name] = match
    if any(match[5] for match in stale.values()):
        with locked(folder):
            _end_publishing(folder, stale)
    for name in stale:
        place = folder / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(place)


def _end_publishing(folder: Path, stale: Mapping[str, re.Match[str]]) -> None:
    """Put files beside outputs where they belong, by how far killed processes came."""
    unnamed = {
        _run(match)
        for name, match in stale.items()
        if not match[5] and not has_become(folder / name, folder / match[1][1:])
    }
    for name, match in stale.items():
        wanted = "-old" if _run(match) in unnamed else "-new"
        if match[5] == wanted and (folder / name).is_file():
            with contextlib.suppress(OSError):  # something lies there
                rename_new(folder / name, folder / match[1][1:])


def _run(match: re.Match[str]) -> tuple[str, ...]:
    """Return what the temporaries of one output and those beside it have in common."""
    return match[2], match[3], match[4]


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
