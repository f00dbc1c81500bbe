"""Several adapters at once, and their names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from loratools.face.source import label, opened
from loratools.hub.references import Wanted
from loratools.work.open_files import allow_open_files
from loratools.work.requests import Reading
from loratools.work.selection import Dropping
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError
from loratools_formats.disk.hub_cache import cached_place, shown_path

Shelf = Annotated[
    Mapping[str, str | os.PathLike[str] | Adapter] | Sequence[str | os.PathLike[str] | Adapter],
    Wanted("adapter"),
]
"""Adapters: several, or by the names they are to go by."""


def named_adapters(
    adapters: Any, reading: Reading, dropping: Dropping | None = None
) -> dict[str, Adapter]:
    """Return adapters by their names: the shortest ends of their paths that tell them apart.

    Raises:
        OptionError: it is no shelf, or an adapter is given twice.
    """
    if isinstance(adapters, Sequence | Mapping) and not isinstance(adapters, str):
        allow_open_files(len(adapters))
    if isinstance(adapters, Mapping):
        return {str(name): opened(one, reading, dropping) for name, one in adapters.items()}
    if isinstance(adapters, str | os.PathLike | Adapter) or not isinstance(adapters, Iterable):
        raise OptionError("several adapters are wanted", got=repr(adapters))
    # The record of a call holds pairs of adapter and weight; adapters of a shelf have no weight.
    sources = [one[0] if isinstance(one, tuple) else one for one in adapters]
    places = [_place(one) for one in sources]
    known = [os.path.realpath(place) for place in places if place is not None]
    if len(set(known)) < len(known):
        raise OptionError("an adapter is given twice", got=", ".join(map(str, places)))
    names = [label(one) if place is None else _last_part(place)
             for one, place in zip(sources, places, strict=True)]  # fmt: skip
    if len(set(names)) < len(names):
        names = [f"{n} {i}" if p is None else str(shown_path(p))
                 for i, (n, p) in enumerate(zip(names, places, strict=True), 1)]  # fmt: skip
    return {name: opened(one, reading, dropping) for name, one in zip(names, sources, strict=True)}


def _last_part(path: str) -> str:
    place = cached_place(path)
    return os.path.basename(os.path.abspath(path)) if place is None else place.name


def _place(source: Any) -> str | None:
    if isinstance(source, Adapter):
        return None if source.source is None else str(source.source)
    return os.fspath(source) if isinstance(source, str | os.PathLike) else None
