"""Where a fleet's outputs go: a folder, or anything that fsspec writes to (s3://, hf://buckets/).

Outputs are whole or not there. In a folder the operations see to that. An object store shows each
file whole, and the statement comes last and only if none is there: an output without its statement
is not done, and the second of two launchers gets an error.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loratools.hub.client import talking
from loratools.hub.references import is_explicit, parse_target
from loratools.pipeline.fleet.addresses import address, opened, without_scheme
from loratools.work.digests_of import digest_like
from loratools_formats.disk.errors import (
    LoratoolsError,
    MissingFileError,
    OutputError,
    OutputExistsError,
)
from loratools_formats.disk.files import read_small_file
from loratools_formats.disk.provenance import (
    MOST_STATEMENT_BYTES,
    PROVENANCE_FILE,
    parsed_statement,
)
from loratools_formats.disk.renames import rename_new
from loratools_formats.disk.temporaries import temporary_beside, temporary_folder

Made = TypeVar("Made")

_MOST_BYTES = 1 << 30
"""Of a manifest or a report: some hundred thousand lines."""
_MOST_TRIES = 100
OWN = ".loratools-fleet"
"""Folder of marks among the outputs; it is gone when nothing runs."""


class Store(ABC):
    """A place of outputs by name."""

    @abstractmethod
    def shown(self, name: str = "") -> str:
        """Return what reports call an output, or the place itself."""

    @abstractmethod
    def statement(self, name: str) -> tuple[dict[str, Any], int | None] | None:
        """Return what is said of an output that is there, and when it was, in ns if known.

        Returns:
            None if the output or its statement is not there, or not sound.
        """

    @abstractmethod
    def exists(self, name: str, claim: bytes) -> bool:
        """Return whether something has an output's name that a process has not begun by a claim."""

    @abstractmethod
    def holds(self, name: str, subjects: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the files of an output are there, by what its statement says of them."""

    @abstractmethod
    def make(
        self, name: str, work: Callable[[Path], Made], claim: bytes, *, overwrite: bool
    ) -> Made:
        """Let `work` write an output to the path it is called with, and keep it.

        Args:
            name: of the output.
            work: what makes it.
            claim: equal for processes that make the same output, and for no others.
            overwrite: whether an output of another run may be replaced.

        Raises:
            OutputExistsError: the output came in the meantime, and may not be replaced.
            OutputError: it could not be written.
        """

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Return a small file; None if it is not there.

        Raises:
            LoratoolsError: something else is there, or it cannot be read.
        """

    @abstractmethod
    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Write a small file whole; return False if it should be new and one is there.

        Raises:
            OutputError: it could not be written.
        """

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a small file, if it is there."""

    def is_new(self) -> bool:
        """Return whether the place itself is not there yet."""
        return False

    def drop(self) -> None:  # noqa: B027 - only a folder can be there and empty
        """Remove the place itself, if it is there and empty."""


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
        place = output / PROVENANCE_FILE if output.is_dir() else _beside(output)
        if not output.exists():
            return None
        try:
            made_ns = place.stat().st_mtime_ns
            found = _parsed(read_small_file(place, MOST_STATEMENT_BYTES), str(place))
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


class Remote(Store):
    """A folder of an object store, through fsspec."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = opened(url)
        self._url = url
        self._reference = parse_target(url) if is_explicit(url) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Remote, (self._url,)

    def shown(self, name: str = "") -> str:
        """Return the path of an output, or of the place itself."""
        return f"{self._url}/{name}" if name else self._url

    def statement(self, name: str) -> tuple[dict[str, Any], int | None] | None:
        """Return what is said of an output that is there, and when it was, if known."""
        for place in (f"{name}/{PROVENANCE_FILE}", f"{name}.{PROVENANCE_FILE}"):
            data = self.read(place)
            found = None if data is None else _parsed(data, self.shown(place))
            if found is not None:
                return found, None
        return None

    def exists(self, name: str, claim: bytes) -> bool:
        """Return whether something has an output's name that a process has not begun by a claim."""
        with self._named(name):
            there = self._fs.exists(self._at(name))
            return bool(there) and self.read(_begun(name)) != claim

    def holds(self, name: str, subjects: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether the files of an output are there; their bytes are not fetched."""
        with self._named(name):
            is_file = self._fs.isfile(self._at(name))
            names = [name if is_file else f"{name}/{one.get('name')}" for one in subjects]
            return bool(names) and all(self._fs.exists(self._at(place)) for place in names)

    def make(
        self, name: str, work: Callable[[Path], Made], claim: bytes, *, overwrite: bool
    ) -> Made:
        """Let `work` write an output to the path it is called with, and keep it.

        A claim says while files are put by which run. What a killed process left is known by it as
        ours, and no two runs that differ put their files into one output.
        """
        with temporary_folder("loratools-fleet") as folder:
            output = folder / "outputs" / Path(name).name  # no input lies near it
            result = work(output)
            last = f"{name}/{PROVENANCE_FILE}" if output.is_dir() else _beside_name(name)
            files = {name: output}
            if output.is_dir():
                here = sorted(path for path in output.rglob("*") if path.is_file())
                files = {f"{name}/{path.relative_to(output).as_posix()}": path for path in here}
            elif (said := _beside(output)).is_file():
                files[last] = said
            if overwrite:
                self.write(_begun(name), claim)
                self.remove(last)  # until all is there again, the output is not done
            elif not self.write(_begun(name), claim, new=True) and not self._is_begun(name, claim):
                raise self._appeared(name)
            elif self.read(last) is not None:
                self.remove(_begun(name))  # another process was first, and has ended
                raise self._appeared(name)
            for place, file in files.items():
                if place != last:
                    with self._named(place):
                        self._fs.put_file(str(file), self._at(place))
            if not self._is_begun(name, claim):
                raise self._appeared(name)
            if last in files and not self.write(last, files[last].read_bytes(), new=True):
                raise self._appeared(name)
            self.remove(_begun(name))
            return result

    def _is_begun(self, name: str, claim: bytes) -> bool:
        return self.read(_begun(name)) == claim

    def _appeared(self, name: str) -> OutputExistsError:
        return OutputExistsError(
            "another run has made the output meanwhile, or was stopped while making it",
            path=self.shown(name),
            hint="Pass `overwrite=True` once no other run puts it",
        )

    def read(self, name: str) -> bytes | None:
        """Return a small file; None if it is not there."""
        with self._named(name):
            try:
                data: bytes = self._fs.cat_file(self._at(name))
            except (FileNotFoundError, IsADirectoryError):
                return None
            return data

    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Write a small file whole; return False if it should be new and one is there."""
        place = self._at(name)
        with self._named(name):
            if not new:
                self._fs.pipe_file(place, data)
                return True
            try:
                self._fs.pipe_file(place, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError, ValueError):
                if self._fs.exists(place):  # no condition here: looked at before, not at once
                    return False
                self._fs.pipe_file(place, data)
            return True

    def remove(self, name: str) -> None:
        """Remove a small file, if it is there."""
        with self._named(name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _named(self, name: str) -> Any:
        """Let what a store's client raises say which address it is about.

        What it may remember of the place is forgotten first: another process may have written.
        """
        try:
            with contextlib.nullcontext() if self._reference is None else talking(self._reference):
                self._fs.invalidate_cache()
                yield
        except LoratoolsError:
            raise
        except Exception as error:
            message = f"the store refused: {type(error).__name__}: {error}"
            raise OutputError(message, path=self.shown(name)) from error


def _beside(output: Path) -> Path:
    return Path(_beside_name(str(output)))


def _beside_name(name: str) -> str:
    return f"{name}.{PROVENANCE_FILE}"


def _begun(name: str) -> str:
    return f"{OWN}/begun/{name}"


def _parsed(data: bytes, place: str) -> dict[str, Any] | None:
    """Return a statement's predicate; None if it is not sound."""
    try:
        found = parsed_statement(data, place)
    except LoratoolsError:
        return None
    return {**found["predicate"], "subject": found["subject"]}


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
