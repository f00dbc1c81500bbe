"""`fleet_index`, `fleet_similar`, `fleet_dedup`: many adapters, compared by their changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

from loratools.algebra.median import median
from loratools.algebra.sketch import standard_errors
from loratools.face.declare import public
from loratools.face.result import Result
from loratools.face.source import WRITING, Source, destination, opened
from loratools.hub.references import Wanted, path_of
from loratools.operations.index.file import Index, read_index
from loratools.operations.index.making import Failure, make_index
from loratools.operations.index.searching import (
    DedupOptions,
    Duplicate,
    Neighbour,
    Originals,
    SearchOptions,
    duplicates,
    neighbours,
)
from loratools.operations.index.sketching import Subject, rows
from loratools.work.declared import option
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Reading, Writing
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import LoratoolsError, OptionError

Paths = Annotated[Sequence[str | os.PathLike[str]], Wanted("adapter", late=True)]
"""Adapters by their paths, or by references to the Hub."""

_READING = ("from_", "ignore_key")


@dataclass(frozen=True)
class IndexOptions:
    """How to make an index.

    Attributes:
        update: keep what the existing output holds about adapters whose content has not changed.
    """

    update: bool = option(False, heading="Output")


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetIndexResult(Result):
    """An index of adapters.

    Attributes:
        adapters: number of rows.
        added: how many of them were read for it.
        kept: how many an earlier index had.
        failed: adapters that could not be read, and why.
        standard_error: of estimated cosines near 0, the median over the adapters.
        bytes_out: size of the file.
    """

    operation: ClassVar[str] = "fleet-index"

    adapters: int
    added: int
    kept: int
    failed: tuple[Failure, ...]
    standard_error: float
    bytes_out: int


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetSimilarResult(Result):
    """The nearest neighbours of an adapter.

    Attributes:
        source: the adapter.
        index: where was looked.
        adapters: number of adapters in the index.
        neighbours: the nearest, the nearest first.
        unverified: paths of neighbours that are gone, or not as the index knows them.
    """

    operation: ClassVar[str] = "fleet-similar"

    source: str | None
    index: str
    adapters: int
    neighbours: tuple[Neighbour, ...]
    unverified: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetDedupResult(Result):
    """Near-duplicates and kin among adapters.

    Attributes:
        index: where was looked.
        adapters: number of adapters in the index.
        pairs: near-duplicates.
        groups: the same, joined.
        same_a: groups whose A factors are the same bits, such as of training with A frozen.
        same_start: groups joined by cosines of A, such as of training from one initialisation.
        unverified: paths of adapters that are gone, or not as the index knows them.
    """

    operation: ClassVar[str] = "fleet-dedup"

    index: str
    adapters: int
    pairs: tuple[Duplicate, ...]
    groups: tuple[tuple[str, ...], ...]
    same_a: tuple[tuple[str, ...], ...]
    same_start: tuple[tuple[str, ...], ...]
    unverified: tuple[str, ...]


@public(reading=_READING, writing=WRITING)
def fleet_index(
    adapters: Paths,
    *,
    options: IndexOptions,
    threads: Workers,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> FleetIndexResult:
    """Index adapters by sketches of their ΔW, from which cosines of any two are estimated.

    >>> import loratools as lt
    >>> found = lt.fleet_index(["examples/tiny-llama/lora", "examples/tiny-llama/rslora"])
    >>> found.adapters, found.standard_error < 0.05
    (2, True)

    Args:
        adapters: paths, or references to the Hub.
        progress: called with (adapters done, adapters in all).

    Raises:
        OptionError: no adapters, or one given twice.
        LoratoolsError: none of them can be read.
        OutputExistsError: the output exists, and neither `overwrite` nor `update` is true.
    """
    if isinstance(adapters, str | os.PathLike):
        raise OptionError("not a list of adapters", got=repr(adapters))
    paths, away = _located(adapters)
    earlier = None
    output = writing.output
    if options.update:
        if output is None:
            raise OptionError("`update` takes over an earlier output, and none is given")
        earlier = read_index(output) if output.exists() else None
        writing = Writing(output=output, overwrite=True)
    writing = destination(writing, None, paths)
    made = make_index(
        paths,
        Path.cwd() if output is None else output.parent,
        partial(opened, reading=reading),
        earlier=earlier,
        workers=threads.workers,
        progress=progress,
    )
    if output is not None:
        made.index.write(output, overwrite=writing.overwrite)
    return FleetIndexResult(
        adapters=len(made.index.entries),
        added=made.added,
        kept=made.kept,
        failed=(*away, *made.failed),
        standard_error=_standard_error(made.index),
        bytes_out=made.index.nbytes,
    )


@public(reading=_READING)
def fleet_similar(
    source: Source,
    index: str | os.PathLike[str],
    *,
    options: SearchOptions,
    threads: Workers,
    reading: Reading,
) -> FleetSimilarResult:
    """Find the adapters of an index that are nearest to one.

    >>> import tempfile
    >>> import loratools as lt
    >>> lora = "examples/tiny-llama/lora"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     index = f"{folder}/index.safetensors"
    ...     made = lt.fleet_index([lora, "examples/tiny-llama/rslora"], output=index)
    ...     nearest = lt.fleet_similar(lora, index).neighbours[0]
    >>> nearest.path.endswith("lora"), round(nearest.cosine, 6)
    (True, 1.0)

    Args:
        source: the adapter; it need not be in the index.
        index: a file that `fleet_index` made.

    Raises:
        AdapterError: no sound index, or an adapter that changes nothing.
        UnsupportedError: the adapter's change is not known.
    """
    found, adapter = read_index(index), opened(source, reading)
    path = "" if adapter.source is None else str(adapter.source)
    (row,) = rows([Subject.of(path, adapter)], threads.workers)
    if isinstance(row, LoratoolsError):
        raise row
    originals = Originals(Path(index).parent, _read)
    return FleetSimilarResult(
        source=path or None,
        index=os.fspath(index),
        adapters=len(found.entries),
        neighbours=neighbours(found, row, adapter, options, originals),
        unverified=tuple(originals.missing),
    )


@public()
def fleet_dedup(index: str | os.PathLike[str], *, options: DedupOptions) -> FleetDedupResult:
    """Find near-duplicates among the adapters of an index, and groups with the same start.

    >>> import tempfile
    >>> import loratools as lt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     index = f"{folder}/index.safetensors"
    ...     small = lt.squeeze("examples/tiny-llama/lora", rank=31, output=f"{folder}/small")
    ...     made = lt.fleet_index(["examples/tiny-llama/lora", f"{folder}/small"], output=index)
    ...     (pair,) = lt.fleet_dedup(index).pairs
    >>> pair.cosine > 0.999
    True

    Args:
        index: a file that `fleet_index` made.

    Raises:
        AdapterError: no sound index.
    """
    found = read_index(index)
    originals = Originals(Path(index).parent, _read)
    return FleetDedupResult.of(
        duplicates(found, options, originals),
        index=os.fspath(index),
        adapters=len(found.entries),
    )


def _located(adapters: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[Failure]]:
    """Return where adapters are, those on the Hub in its cache, and which cannot be brought here.

    Raises:
        LoratoolsError: none of them can be found; the reason for the first.
    """
    from loratools.hub.resolve import located

    paths, failed = [], []
    errors: list[LoratoolsError] = []
    for one in adapters:
        try:
            paths.append(located(one, "adapter") or path_of(one))
        except LoratoolsError as error:
            errors.append(error)
            failed.append(Failure(os.fspath(one), str(error)))
    if errors and not paths:
        raise errors[0]
    return paths, failed


def _read(path: Path | str) -> Adapter:
    """Open an adapter of an index, by its path or its reference."""
    from loratools.hub.resolve import located

    return opened(located(path, "adapter") or path, Reading())


def _standard_error(index: Index) -> float:
    """Return the median of the standard errors of neighbouring rows, which stand for all pairs."""
    errors = [
        standard_errors(index.shares[i : i + 1], index.shares[j : j + 1])[0, 0]
        for i in range(len(index.entries))
        for j in [(i + 1) % len(index.entries)]
    ]
    return median(errors)
