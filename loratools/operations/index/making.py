"""`index`: one row for each adapter, in a file; rows of an earlier index are taken over.

Adapters are identified by the content of their files, not by times or names: an adapter that the
earlier index has is digested and not read again, and the file is the same as one made from nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.operations.index.file import Index, Row
from loratools.operations.index.sketching import Outcome, Subject, digest_of, rows
from loratools.work.requests import Progress
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import LoratoolsError, OptionError
from loratools_formats.disk.hub_cache import cached_place

_BATCH = 64

Read = Callable[[Path], Adapter]


@dataclass(frozen=True)
class Failure:
    """An adapter that has no row.

    Attributes:
        path: where it lies.
        reason: why not.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Made:
    """An index, not yet written.

    Attributes:
        index: its rows.
        added: number of adapters that were read for it.
        kept: number of rows that an earlier index had.
        failed: adapters that have no row.
    """

    index: Index
    added: int
    kept: int
    failed: tuple[Failure, ...]


def make_index(
    paths: Sequence[Path],
    folder: Path,
    read: Read,
    *,
    earlier: Index | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Made:
    """Return the index of adapters.

    Args:
        paths: where they lie.
        folder: of the index, to which paths are relative.
        read: opens an adapter.
        earlier: an index whose rows may be taken over.
        workers: threads over modules; results do not depend on it.
        progress: called with (adapters done, adapters in all).

    Raises:
        OptionError: no adapters, or one given twice.
        LoratoolsError: none could be read; the reason for the first.
    """
    named = {_relative(path, folder): path for path in paths}
    if not named:
        raise OptionError("no adapters to index")
    if len(named) < len(paths):
        raise OptionError("an adapter is given twice", got=", ".join(map(str, paths)))
    known = {} if earlier is None else _by_digest(earlier)
    found: dict[str, Row] = {}
    failed: dict[str, LoratoolsError] = {}
    kept = 0
    for batch in _batches(list(named)):
        outcomes, taken = _batch({name: named[name] for name in batch}, read, known, workers)
        kept += taken
        for name, outcome in outcomes.items():
            if isinstance(outcome, LoratoolsError):
                failed[name] = outcome
            else:
                found[name] = outcome
        if progress is not None:
            progress(len(found) + len(failed), len(named))
    if not found:
        raise next(iter(failed.values()))
    return Made(
        Index.of([found[name] for name in sorted(found)]),
        len(found) - kept,
        kept,
        tuple(Failure(str(named[name]), str(failed[name])) for name in sorted(failed)),
    )


def _batch(
    named: Mapping[str, Path], read: Read, known: Mapping[str, Row], workers: int
) -> tuple[dict[str, Outcome], int]:
    """Return the row of each adapter, or why it has none, and how many were known."""
    outcomes: dict[str, Outcome] = {}
    subjects = []
    for name, path in named.items():
        try:
            adapter = read(path)
            digest = digest_of(adapter)
        except LoratoolsError as error:
            outcomes[name] = error
            continue
        if digest in known:
            row = known[digest]
            outcomes[name] = replace(row, entry=replace(row.entry, path=name))
        else:
            subjects.append(Subject.of(name, adapter))
    taken = sum(isinstance(outcome, Row) for outcome in outcomes.values())
    for subject, outcome in zip(subjects, rows(subjects, workers), strict=True):
        outcomes[subject.path] = outcome
    return outcomes, taken


def _by_digest(index: Index) -> dict[str, Row]:
    return {entry.digest: index.row(place) for place, entry in enumerate(index.entries)}


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), _BATCH):
        yield names[start : start + _BATCH]


def _relative(path: Path, folder: Path) -> str:
    """Return a path relative to the index's folder; for a file in the Hub's cache, a reference."""
    place = cached_place(path)
    if place is not None:
        return place.reference
    return os.path.relpath(os.path.abspath(path), os.path.abspath(folder)).replace(os.sep, "/")
