"""Where a fleet's outputs go: a folder, or anything that fsspec writes to (s3://, hf://buckets/)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.pipeline.fleet.addresses import address, without_scheme
from loratools.pipeline.fleet.object_store import Remote
from loratools.pipeline.fleet.store import OWN, Made, Store, parsed_predicate
from loratools.work.digests_of import digest_like
from loratools_formats.disk.errors import (
    LoratoolsError,
    MissingFileError,
    OutputError,
)
from loratools_formats.disk.files import read_small_file
from loratools_formats.disk.provenance import (
    MOST_STATEMENT_BYTES,
    statement_place,
)
from loratools_formats.disk.renames import rename_new
from loratools_formats.disk.temporaries import temporary_beside

_MOST_BYTES = 1 << 30
"""Of a manifest or a report: some hundred thousand lines."""
_MOST_TRIES = 100


def store_of(place: str | os.PathLike[str]) -> Store:
    """Return the store at a path or an address.

    Raises:
        MissingDependencyError: the address needs a package that is not installed.
    """
    place = without_scheme(place)
    url = address(place)
    return Folder(Path(os.path.abspath(place))) if url is None else Remote(url)


class Folder(Store):
    """A folder here, or on a file system that all processes share."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def shown(self, name: str = "") -> str:
        """Return the path of an output, or of the place itself."""
        return str(self.path / name) if name else str(self.path)

    def statement(self, name: str) -> tuple[dict[str, Any], int | None] | None:
        """Return what is said of an output that is there, and when it was, if known."""
        output = self.path / name
        place = statement_place(output)
        if not output.exists():
            return None
        try:
            made_ns = place.stat().st_mtime_ns
            found = parsed_predicate(read_small_file(place, MOST_STATEMENT_BYTES), str(place))
        except (OSError, LoratoolsError):
            return None
        return None if found is None else (found, made_ns)

    def exists(self, name: str, claim: bytes) -> bool:  # noqa: ARG002 - outputs appear whole
        """Return whether something has an output's name."""
        return os.path.lexists(self.path / name)

    def holds(self, name: str, subjects: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the files of an output are there, by their digests."""
        output = self.path / name
        for subject in subjects:
            place = output / str(subject.get("name")) if output.is_dir() else output
            digest = subject.get("digest")
            try:
                if not isinstance(digest, Mapping) or digest_like(place, digest) != dict(digest):
                    return False
            except (LoratoolsError, OSError):
                return False
        return bool(subjects)

    def make(
        self,
        name: str,
        work: Callable[[Path], Made],
        claim: bytes,  # noqa: ARG002 - outputs appear whole
        *,
        overwrite: bool,  # noqa: ARG002 - `work` knows
    ) -> Made:
        """Let `work` write an output to the path it is called with, and keep it."""
        output = self.path / name
        with _named(output):
            output.parent.mkdir(parents=True, exist_ok=True)
        return work(output)

    def read(self, name: str) -> bytes | None:
        """Return a small file; None if it is not there."""
        try:
            return read_small_file(self.path / name, _MOST_BYTES)
        except MissingFileError:
            return None

    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Write a small file whole; return False if it should be new and one is there."""
        place = self.path / name
        with _named(place):
            temporary = _written_beside(place, data)
            try:
                if not new:
                    os.replace(temporary, place)
                    return True
                try:
                    rename_new(temporary, place)
                except FileExistsError:
                    return False
                return True
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()

    def remove(self, name: str) -> None:
        """Remove a small file, if it is there."""
        place = self.path / name
        with contextlib.suppress(OSError):
            place.unlink()
            for folder in place.parents:
                if OWN not in folder.relative_to(self.path).parts:
                    break
                folder.rmdir()

    def is_new(self) -> bool:
        """Return whether the folder is not there yet."""
        return not os.path.lexists(self.path)

    def drop(self) -> None:
        """Remove the folder, if it is there and empty."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def _written_beside(place: Path, data: bytes) -> Path:
    """Write a temporary file, making its folder again if others take it away while it is empty.

    Raises:
        OutputError: it cannot be written there.
        OSError: as well.
    """
    for tries_left in reversed(range(_MOST_TRIES)):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(place)
            temporary.write_bytes(data)
        except (FileNotFoundError, FileExistsError, OutputError) as error:
            is_gone = isinstance(error.__cause__ or error, FileNotFoundError | FileExistsError)
            if not (is_gone and tries_left):
                raise
        else:
            return temporary
    raise AssertionError  # the last try returns or raises


@contextlib.contextmanager
def _named(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", path=path) from error
