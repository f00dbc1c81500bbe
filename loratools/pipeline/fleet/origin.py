"""Where one adapter of a fleet comes from, and what is known of its files before they are here.

Whether an output is done must cost no download. The Hub tells digests of large files. A store marks
the content of each object (its entity tag): if all marks are those of an earlier run, the digests
that were found then still hold.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from loratools.hub.references import Want, is_explicit, parse
from loratools.pipeline.fleet.addresses import Fetched, address
from loratools.work.digests_of import digest_like
from loratools_formats.containers.safetensors_read import header_digest, read_safetensors
from loratools_formats.disk.distant import (
    DistantFile,
    announced_below,
    is_distant,
    open_file,
    withdraw,
)
from loratools_formats.disk.temporaries import temporary_folder

_TAG = "entityTag"
Seen = Mapping[str, tuple[str, str]]
"""Files by name: the mark that a store had for the content, and its sha256."""


class Origin:
    """An adapter or a model here.

    Args:
        path: where it is.
        digests: sha256 of files that need not be here, by where they will be.
    """

    def __init__(self, path: Path, digests: Mapping[Path, str] = MappingProxyType({})) -> None:
        self.path, self._digests = path, digests

    @property
    def marks(self) -> Mapping[str, str]:
        """A store's marks of the contents of all files, by name; empty if there are none."""
        return {}

    @property
    def is_as_seen(self) -> bool:
        """Whether all marks are those of an earlier run."""
        return False

    def bring(self, *, weights: bool) -> None:
        """Bring here what is elsewhere, weights only if asked for: their headers can be read.

        Raises:
            LoratoolsError: it cannot be read, or changed meanwhile.
        """

    def close(self) -> None:
        """Take away what was brought here for this task alone."""

    def named(self, text: str) -> str:
        """Return a text with the address of the adapter in place of where it was brought to."""
        return text

    def files(self) -> list[Path]:
        """Return the files of a folder, hidden ones apart, by where they are or will be."""
        found = set(announced_below(self.path))
        for root, folders, names in os.walk(self.path):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            found |= {Path(root) / name for name in names if not name.startswith(".")}
        return sorted(found)

    def digest_like(self, place: Path, known: Mapping[str, str]) -> dict[str, str] | None:
        """Return a file's digest in the terms of a known one; None if there is none in them.

        Raises:
            LoratoolsError: no such file, or it cannot be read.
        """
        if set(known) == {"sha256"} and is_distant(place) and place in self._digests:
            return {"sha256": self._digests[place]}
        return digest_like(place, known)

    def digest(self, place: Path) -> dict[str, str]:
        """Return what a report says of a file that it may depend on.

        That is the sha256; of weights in a store of which no more was read than the header, that
        of the header, with the store's mark of the whole.
        """
        if not is_distant(place):
            return {"sha256": open_file(place).sha256()}
        if place in self._digests:
            return {"sha256": self._digests[place]}
        return header_digest(read_safetensors(place))


class _Stored(Origin):
    """What an address names, in a temporary folder."""

    def __init__(self, url: str, seen: Seen) -> None:
        self._url = url
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(temporary_folder("loratools-fleet"))
            self._fetched = Fetched(url, folder)
            stack.callback(self._fetched.close)
            self._stack = stack.pop_all()
        marks = self._fetched.marks
        self._is_as_seen = bool(marks) and marks == {name: one[0] for name, one in seen.items()}
        paths = {self._fetched.name_of(path): path for path in self._fetched.files}
        digests = {
            path: seen[name][1]
            for name, path in paths.items()
            if name in marks and name in seen and seen[name][0] == marks[name] and seen[name][1]
        }
        super().__init__(self._fetched.path, digests)

    @property
    def marks(self) -> Mapping[str, str]:
        return self._fetched.marks

    @property
    def is_as_seen(self) -> bool:
        return self._is_as_seen

    def bring(self, *, weights: bool) -> None:
        self._fetched.bring(weights=weights)

    def named(self, text: str) -> str:
        return text.replace(str(self.path), self._url)

    def digest_like(self, place: Path, known: Mapping[str, str]) -> dict[str, str] | None:
        if place not in self._digests:
            self._fetched.bring(weights=False)
        tag = self._tag(place)
        if _TAG not in known:
            return super().digest_like(place, known)
        header = {name: digest for name, digest in known.items() if name != _TAG}
        found = super().digest_like(place, header) if known[_TAG] == tag else None
        return None if found is None else {**found, _TAG: tag}

    def digest(self, place: Path) -> dict[str, str]:
        found = super().digest(place)
        return found if "sha256" in found else {**found, _TAG: self._tag(place)}

    def _tag(self, place: Path) -> str:
        return self.marks.get(self._fetched.name_of(place), "")

    def close(self) -> None:
        self._stack.close()


class _OnHub(Origin):
    """An adapter on the Hub, in the cache as far as it was read."""

    def bring(self, *, weights: bool) -> None:
        for place in announced_below(self.path) if weights else ():
            file = open_file(place)
            if isinstance(file, DistantFile):
                file.bring()
            file.close()

    def close(self) -> None:
        for place in announced_below(self.path):
            withdraw(place)


def origin_of(source: str, want: Want, seen: Seen) -> Origin:
    """Return where a member of a fleet comes from; only small files of it come here by that.

    Args:
        source: a path, an address, or a reference to the Hub.
        want: whether it is an adapter or a model.
        seen: what an earlier run knew of its files.

    Raises:
        LoratoolsError: it is not there, or cannot be reached.
    """
    url = None if is_explicit(source) else address(source)
    if url is not None:
        return _Stored(url, seen)
    reference = None if os.path.lexists(source) else parse(source, want)
    if reference is None:
        return Origin(Path(source))
    from loratools.hub.resolve import resolve

    if want != "adapter":  # the weights of a model come when they are read
        return Origin(resolve(reference, want).path)
    found = resolve(reference, want, beside="all", headers=True)
    return _OnHub(found.path, found.digests)
