"""Weights of a base model that stay on the Hub until they are read: only their headers come first.

A safetensors header is fetched by a range of bytes, as `huggingface_hub` does for its metadata: the
first 100 kB hold most of them, and a second request gets the rest of a longer one. A server without
ranges sends whole files; then only the needed start of the answer is read.
"""

from __future__ import annotations

import functools
import re
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loratools.hub import client
from loratools.hub.listing import Listing
from loratools_formats.containers.safetensors_read import DEFAULT_LIMITS, LENGTH_BYTES
from loratools_formats.disk.distant import DistantFile, announce
from loratools_formats.disk.errors import AdapterError, HubError

_FIRST_BYTES = 100_000
_WORKERS = 8
_TIMEOUT_SECONDS = 30
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")


def announce_weights(found: Listing, names: Sequence[str], *, by_parts: bool = False) -> None:
    """Let weights that are not in the cache be opened where the cache would have them.

    When the first is opened, the headers of all are fetched, some at a time.

    Args:
        found: the repository.
        names: of the files.
        by_parts: whether the first few short reads behind the header bring no whole file.
    """
    away = [name for name in names if not (found.folder / name).is_file()]
    starts = _Starts(found, away, by_parts=by_parts)
    for name in away:
        announce(found.folder / name, functools.partial(starts.open, name))


class _Starts:
    """The headers of a model's weight files."""

    def __init__(self, found: Listing, names: Sequence[str], *, by_parts: bool) -> None:
        self._found, self._names, self._by_parts = found, names, by_parts
        self._known: dict[str, tuple[bytes, int]] = {}
        self._lock = threading.Lock()

    def open(self, name: str) -> DistantFile:
        """Return a file of which only the header is here.

        Raises:
            LoratoolsError: the header could not be fetched, or is none.
        """
        with self._lock:
            if name not in self._known:
                wanted = [other for other in self._names if _series(other) == _series(name)]
                with client.talking(self._found.reference), ThreadPoolExecutor(_WORKERS) as pool:
                    starts = pool.map(functools.partial(_start, self._found), wanted)
                    self._known |= dict(zip(wanted, starts, strict=True))
        start, nbytes = self._known[name]
        fetch = functools.partial(_fetch, self._found, name)
        part = functools.partial(_part, self._found, name) if self._by_parts else None
        return DistantFile(self._found.folder / name, start, nbytes, fetch, part)


def _series(name: str) -> str:
    """Return what the names of all shards of one model share."""
    return re.sub(r"-\d{5}-of-\d{5}\.safetensors$", "", name)


def _fetch(found: Listing, name: str) -> Path:
    hub = client.library(found.reference)
    with client.talking(found.reference):
        revision = found.commit
        return Path(hub.hf_hub_download(found.reference.repo, name, revision=revision))


def _part(found: Listing, name: str, offset: int, count: int) -> bytes:
    with client.talking(found.reference):
        return _range(found, name, offset, count)[0]


def _start(found: Listing, name: str) -> tuple[bytes, int]:
    """Return a file's header with the length in front, and the file's size."""
    if found.is_cached:
        raise HubError(
            "the cache does not hold the weights, and the Hub cannot be reached",
            path=str(found.reference.at(name)),
            hint=f"Fetch them while online: hf download {found.reference.repo} {name}",
        )
    begun, nbytes = _range(found, name, 0, _FIRST_BYTES)
    if len(begun) < LENGTH_BYTES:
        return begun, nbytes
    (length,) = struct.unpack("<Q", begun[:LENGTH_BYTES])
    wanted = LENGTH_BYTES + length
    if length > DEFAULT_LIMITS.header_bytes or wanted > nbytes:
        return begun, nbytes  # the reader says what is wrong with it
    if wanted > len(begun):
        begun += _range(found, name, len(begun), wanted - len(begun))[0]
    return begun, nbytes


def _range(found: Listing, name: str, offset: int, count: int) -> tuple[bytes, int]:
    """Return bytes of a file, and the size of all of it."""
    hub = client.library(found.reference)
    url = hub.hf_hub_url(found.reference.repo, name, revision=found.commit)
    headers = {
        **hub.utils.build_hf_headers(library_name="loratools"),
        "Range": f"bytes={offset}-{offset + count - 1}",
        "Accept-Encoding": "identity",
    }
    session = hub.utils.get_session()
    with session.stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_SECONDS
    ) as response:
        if response.status_code >= 400:
            response.read()
        hub.utils.hf_raise_for_status(response)
        total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        is_part = response.status_code == 206 and total is not None
        data = _read(response, count if is_part else offset + count)
    if total is None or not is_part:
        return data[offset:], int(response.headers.get("Content-Length") or 0)
    nbytes = int(total[1])
    if len(data) != min(count, nbytes - offset):
        raise AdapterError("the Hub sent another range than was asked for", path=name)
    return data, nbytes


def _read(response: Any, count: int) -> bytes:
    data = b""
    for chunk in response.iter_bytes():
        data += chunk
        if len(data) >= count:
            break
    return data[:count]
