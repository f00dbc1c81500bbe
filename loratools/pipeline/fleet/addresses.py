"""Adapters in object stores: listed through fsspec, and brought here whole while they are read."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratools.work.collection import WEIGHTS
from loratools_formats.disk.errors import AdapterError, MissingDependencyError, MissingFileError

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(.+)", re.IGNORECASE)
_CONFIG = "adapter_config.json"


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


def listed(url: str) -> list[str]:
    """Return the addresses of the adapters that one names: itself, its matches, or all below it.

    Raises:
        AdapterError: wildcards match nothing.
        MissingFileError: nothing is there.
    """
    file_system, root = opened(url)
    scheme = url.partition("://")[0]
    try:
        if glob.has_magic(root):
            found = sorted(file_system.glob(root))
        elif file_system.isfile(root) or file_system.exists(f"{root}/{_CONFIG}"):
            found = [root]
        else:
            found = sorted(_below(file_system.find(root)))
    except (OSError, PermissionError) as error:
        raise MissingFileError(f"cannot be listed: {error}", path=url) from error
    if not found:
        raise AdapterError("no adapter is there", path=url)
    return [f"{scheme}://{place.lstrip('/')}" for place in found]


def _below(files: list[str]) -> Iterator[str]:
    folders = {name.rpartition("/")[0] for name in files if name.endswith(f"/{_CONFIG}")}
    yield from folders
    for name in files:
        if name.endswith(WEIGHTS) and not any(name.startswith(f"{each}/") for each in folders):
            yield name


def fetched(url: str, folder: Path) -> Path:
    """Bring what an address names into a folder, and return where.

    Raises:
        MissingFileError: nothing is there, or it cannot be read.
    """
    file_system, root = opened(url)
    target = folder / root.rstrip("/").rpartition("/")[2]
    try:
        if file_system.isfile(root):
            file_system.get_file(root, str(target))
            return target
        for name in file_system.find(root):
            place = target / name[len(root) :].lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            file_system.get_file(name, str(place))
    except (OSError, PermissionError) as error:
        raise MissingFileError(f"cannot be read: {error}", path=url) from error
    if not target.exists():
        raise MissingFileError("nothing is there", path=url)
    return target
