"""Where the inputs of an operation are, by their digests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from loratools.pipeline.recorded import RecordedFile, RecordedInput
from loratools.work.digests_of import digest_like
from loratools_formats.contract.path_kinds import missing
from loratools_formats.disk.errors import LoratoolsError

_MOST_FILES = 20_000
_DEEPEST = 4


class Finder:
    """Looks for inputs.

    Args:
        given: files and folders of the user's, which may be inputs or hold them.

    Raises:
        MissingFileError: one does not exist.
    """

    def __init__(self, given: Sequence[Path]) -> None:
        for path in given:
            if not path.exists():
                raise missing(path)
        self._given = given
        self._digests: dict[tuple[Path, tuple[str, ...]], Mapping[str, str] | None] = {}

    def find(self, wanted: RecordedInput) -> Path | None:
        """Return the path that holds an input; None if none does."""
        if not wanted.files:
            return Path(wanted.path) if wanted.path and os.path.exists(wanted.path) else None
        return next((p for p in self._candidates(wanted) if self._holds(p, wanted.files)), None)

    def _candidates(self, wanted: RecordedInput) -> Iterator[Path]:
        if wanted.path is not None:
            yield Path(wanted.path)
        name = wanted.files[0].name
        for path in self._given:
            yield path
            for folder in _folders(path):
                yield folder
                if (folder / name).is_file():
                    yield folder / name

    def _holds(self, path: Path, files: Sequence[RecordedFile]) -> bool:
        """Whether a folder has all files, or a file is the first and the others lie beside it."""
        if path.is_dir():
            return all(self._is(path / one.name, one.digest) for one in files)
        first, *others = files
        beside = all(self._is(path.parent / one.name, one.digest) for one in others)
        return beside and self._is(path, first.digest)

    def _is(self, path: Path, digest: Mapping[str, str]) -> bool:
        key = (path, tuple(sorted(digest)))
        if key not in self._digests:
            try:
                self._digests[key] = digest_like(path, digest)
            except (LoratoolsError, OSError):
                self._digests[key] = None
        return self._digests[key] == dict(digest)


def _folders(path: Path) -> Iterator[Path]:
    """Yield the folders below one, as far as inputs may reasonably lie."""
    seen = 0
    for root, folders, files in os.walk(path):
        depth = len(Path(root).relative_to(path).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth < _DEEPEST else []
        seen += len(files)
        if seen > _MOST_FILES:
            return
        yield Path(root)
