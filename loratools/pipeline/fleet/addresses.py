"""Adapters in object stores, through fsspec: listed, known by their headers, brought here whole."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loratools.work.collection import is_named_as_adapter
from loratools_formats.containers.safetensors_read import DEFAULT_LIMITS, LENGTH_BYTES
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.disk.distant import DistantFile, announce, withdraw
from loratools_formats.disk.errors import (
    AdapterError,
    MissingDependencyError,
    MissingFileError,
    StoreError,
)

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(.+)", re.IGNORECASE)
_HERE = re.compile(r"(?:file|local):(?://)?(/(?!/).*)", re.IGNORECASE | re.DOTALL)
_FIRST_BYTES = 100_000
_TAGS = ("ETag", "etag", "xet_hash")
"""What stores call the mark of an object's content, by which they tell whether it changed."""


def address(text: str | os.PathLike[str]) -> str | None:
    """Return a text as an address, with the slashes that a `Path` takes out; None for a path.

    >>> address("s3:/bucket/small/"), address("adapters/*")
    ('s3://bucket/small', None)
    """
    given = os.fspath(text)
    found = _URL.fullmatch(given)
    if found is None or os.path.lexists(given):
        return None
    return f"{found[1].lower()}://{found[2].rstrip('/')}"


def without_scheme(text: str | os.PathLike[str]) -> str:
    """Return the absolute path that a file:// address names; any other text as it is.

    >>> without_scheme("file:///data/out"), without_scheme("file:/data/out"), without_scheme("out")
    ('/data/out', '/data/out', 'out')
    """
    given = os.fspath(text)
    found = _HERE.fullmatch(given)
    return given if found is None or os.path.lexists(given) else found[1]


def canonical(url: str) -> str:
    """Return an address that is equal for all spellings of a place, such as s3a:// for s3://.

    Raises:
        LoratoolsError: as `opened`.
    """
    file_system, root = opened(url)
    known = file_system.protocol
    return f"{known if isinstance(known, str) else known[0]}://{root.strip('/')}"


def opened(url: str) -> tuple[Any, str]:
    """Return the file system of an address, which remembers no listings, and the place in it.

    Raises:
        MissingDependencyError: the address needs a package that is not installed.
        MissingFileError: nobody knows such addresses.
    """
    try:
        import fsspec

        file_system, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise MissingDependencyError(
            "the address needs another package",
            got=url,
            hint=f"pip install 'loratools[fleet]'; fsspec says: {error}",
        ) from error
    except ValueError as error:
        raise MissingFileError(f"not an address: {error}", path=url) from error
    return file_system, root


def listed(url: str, output: str | None = None) -> list[str]:
    """Return the addresses of the adapters that one names: itself, its matches, or all below it.

    Names that begin with a dot are skipped, as on the disk; the marks of a fleet have such names.

    Args:
        url: an address.
        output: the canonical address of the outputs. A match that holds it stands for the adapters
            below it, if it is none itself: that it is there is the fleet's own doing.

    Raises:
        AdapterError: wildcards match nothing.
        MissingFileError: nothing is there.
        StoreError: the store cannot be reached, or refused.
    """
    file_system, root = opened(url)
    scheme = url.partition("://")[0]
    try:
        if glob.has_magic(root):
            found = []
            for match in _shown(sorted(file_system.glob(root)), root):
                holds_output = f"{output}/".startswith(f"{canonical(f'{scheme}://{match}')}/")
                found += _adapters(file_system, match) if holds_output else [match]
        else:
            found = _adapters(file_system, root)
    except (FileNotFoundError, PermissionError) as error:
        raise MissingFileError(f"cannot be listed: {error}", path=url) from error
    except OSError as error:
        raise StoreError(f"cannot be listed: {error}", path=url) from error
    if not found:
        raise AdapterError("no adapter is there", path=url)
    return [f"{scheme}://{place.lstrip('/')}" for place in found]


def _adapters(file_system: Any, root: str) -> list[str]:
    if file_system.isfile(root) or file_system.exists(f"{root}/{ADAPTER_CONFIG}"):
        return [root]
    files = [name for name in file_system.find(root) if not _is_hidden(name[len(root) :])]
    return sorted(_below(files))


def _shown(matches: list[str], pattern: str) -> list[str]:
    """Return the matches that a shell would have: a wildcard stands for no dot at the start."""
    parts = pattern.split("/")
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    if _is_hidden("/".join(parts[first:])):
        return matches
    return [name for name in matches if not _is_hidden("/".join(name.split("/")[first:]))]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _below(files: list[str]) -> Iterator[str]:
    folders = {name.rpartition("/")[0] for name in files if name.endswith(f"/{ADAPTER_CONFIG}")}
    yield from folders
    for name in files:
        if is_named_as_adapter(name) and not any(name.startswith(f"{each}/") for each in folders):
            yield name


@dataclass(frozen=True)
class _Object:
    """A file of a store: where, how large, and the store's mark of its content, if it has one."""

    place: str
    nbytes: int
    mark: str | None


class Fetched:
    """What an address names; a folder here gets of it what is needed.

    Until then its files can be opened at the paths that they will have: the header of a safetensors
    file then comes alone, by a range of bytes, and so do a few short reads behind it; any other
    file comes whole.

    Args:
        url: the address.
        folder: an empty one.

    Raises:
        MissingFileError: nothing is there, or it may not be listed.
        StoreError: the store cannot be reached, or refused.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self._url = url
        self._fs, self._root = opened(url)
        self.path = folder / PurePosixPath(self._root).name
        """Where it is, or will be."""
        self._objects = self._listed()
        self._starts: dict[Path, bytes] = {}
        for path in self._objects:
            announce(path, functools.partial(self._open, path))

    @property
    def marks(self) -> dict[str, str]:
        """The store's marks of the files' contents, by name; empty if it has none for one."""
        found = {self.name_of(path): each.mark for path, each in self._objects.items()}
        return {name: mark for name, mark in found.items() if mark} if all(found.values()) else {}

    @property
    def files(self) -> list[Path]:
        """Where the files are, or will be."""
        return list(self._objects)

    def name_of(self, path: Path) -> str:
        """Return what a file is called in what the address names."""
        return path.name if path == self.path else path.relative_to(self.path).as_posix()

    def bring(self, *, weights: bool) -> None:
        """Bring the files here; those that show what they are by their header only if asked for.

        Raises:
            MissingFileError: one is not there any more.
            StoreError: one cannot be read.
            AdapterError: one changed meanwhile.
        """
        wanted = [path for path in self._objects if weights or not self._may_wait(path)]
        if missing := [path for path in wanted if not path.exists()]:
            for path in missing:
                self._fetch(path)
            self._check_unchanged()

    def close(self) -> None:
        """Forget the files that did not come."""
        for path in self._objects:
            withdraw(path)

    def _may_wait(self, path: Path) -> bool:
        one, has_config = self._objects[path], path.parent / ADAPTER_CONFIG in self._objects
        is_large = one.nbytes > _FIRST_BYTES and one.mark is not None
        return path.suffix == ".safetensors" and has_config and is_large

    def _listed(self) -> dict[Path, _Object]:
        with self._telling():
            found: dict[str, Mapping[str, Any]] = self._fs.find(self._root, detail=True)
        objects = {}
        for place, info in sorted(found.items()):
            inside = place[len(self._root) :].strip("/")
            if any(part in ("", ".", "..") for part in inside.split("/")) and inside:
                raise AdapterError("the name of an object is not a path", path=self._url, got=place)
            tag = next((str(info[key]) for key in _TAGS if info.get(key)), None)
            nbytes = int(info.get("size") or 0)
            mark = None if tag is None else f"{tag.strip(chr(34))} {nbytes}"
            objects[self.path / inside if inside else self.path] = _Object(place, nbytes, mark)
        if not objects:
            raise MissingFileError("nothing is there", path=self._url)
        return objects

    def _fetch(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with self._telling():
            self._fs.get_file(self._objects[path].place, str(part))
        part.rename(path)

    def _alone(self, path: Path) -> Path:
        if not path.exists():
            self._fetch(path)
            self._check_unchanged()
        return path

    def _check_unchanged(self) -> None:
        """Raise `AdapterError` if the store lists other files than at first."""
        if self._listed() != self._objects:
            raise AdapterError("changed while it was being read", path=self._url)

    def _open(self, path: Path) -> DistantFile:
        """Return a file of which only the header is here."""
        if path not in self._starts:
            self._starts[path] = self._start(path) if path.suffix == ".safetensors" else b""
        fetch, part = functools.partial(self._alone, path), functools.partial(self._part, path)
        nbytes = self._objects[path].nbytes
        return DistantFile(path, self._starts[path], nbytes, fetch, part)

    def _start(self, path: Path) -> bytes:
        nbytes = self._objects[path].nbytes
        start = self._part(path, 0, min(_FIRST_BYTES, nbytes))
        wanted = LENGTH_BYTES + int.from_bytes(start[:LENGTH_BYTES], "little")
        if wanted <= DEFAULT_LIMITS.header_bytes and len(start) < wanted <= nbytes:
            start += self._part(path, len(start), wanted - len(start))
        return start

    def _part(self, path: Path, offset: int, count: int) -> bytes:
        with self._telling():
            place = self._objects[path].place
            data: bytes = self._fs.cat_file(place, start=offset, end=offset + count)
        if len(data) != count:
            raise AdapterError("the store sent another range than was asked for", path=self._url)
        return data

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Let what a store's client raises say which address it is about."""
        try:
            yield
        except (FileNotFoundError, PermissionError) as error:
            raise MissingFileError(f"cannot be read: {error}", path=self._url) from error
        except OSError as error:
            raise StoreError(f"cannot be read: {error}", path=self._url) from error
