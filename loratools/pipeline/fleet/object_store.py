"""A fleet's outputs in an object store, through fsspec."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratools.hub.client import talking
from loratools.hub.references import is_explicit, parse_target
from loratools.pipeline.fleet.addresses import opened
from loratools.pipeline.fleet.store import OWN, Made, Store, parsed_predicate
from loratools_formats.disk.errors import LoratoolsError, OutputError, OutputExistsError
from loratools_formats.disk.provenance import PROVENANCE_FILE, beside_name, statement_place
from loratools_formats.disk.temporaries import temporary_folder


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
        for place in (f"{name}/{PROVENANCE_FILE}", beside_name(name)):
            data = self.read(place)
            found = None if data is None else parsed_predicate(data, self.shown(place))
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
            last = f"{name}/{PROVENANCE_FILE}" if output.is_dir() else beside_name(name)
            files = {name: output}
            if output.is_dir():
                here = sorted(path for path in output.rglob("*") if path.is_file())
                files = {f"{name}/{path.relative_to(output).as_posix()}": path for path in here}
            elif (said := statement_place(output)).is_file():
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


def _begun(name: str) -> str:
    return f"{OWN}/begun/{name}"
