"""Files beside an adapter that belong to it, and are kept beside what is made of it."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from loratools_formats.core.attachments import ATTACHMENTS
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.files import inside, read_small_file
from loratools_formats.disk.strict_json import StrictJsonError, loads

_MODULES = "modules.json"
_MOST_BYTES = 1 << 20


def attachments(folder: Path) -> dict[str, Path]:
    """Return the files to keep, by their paths in the folder.

    Raises:
        AdapterError: a link leads out of the folder, or the list of modules does.
    """
    names = [name for name in standing(folder) if (folder / name).is_file()]
    if _MODULES in names:
        names += _of_sentence_transformers(folder)
    return {name: inside(folder, name) for name in names}


def standing(folder: Path) -> list[str]:
    """Return which of the names of `ATTACHMENTS` stand in a folder, files or not.

    A folder is listed once, which is faster than to ask for each name. On a disk that does not tell
    capital letters from small ones, a name may be listed in other letters.
    """
    listed = {name.casefold() for name in os.listdir(folder)}
    return [
        name for name in ATTACHMENTS if name.casefold() in listed and os.path.lexists(folder / name)
    ]


def _of_sentence_transformers(folder: Path) -> list[str]:
    """Return the files of the modules that sentence-transformers puts after the adapted model.

    `modules.json` lists them with their folders. Without them a pooling is taken that the model was
    not trained with, and its embeddings are others.
    """
    try:
        entries = loads(read_small_file(inside(folder, _MODULES), _MOST_BYTES), max_depth=8)
    except StrictJsonError as error:
        raise AdapterError(f"{_MODULES} is no JSON: {error}", path=folder) from error
    found: list[str] = []
    for entry in entries if isinstance(entries, list) else []:
        place = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(place, str) or not place:
            continue
        parts = PurePosixPath(place).parts
        if ".." in parts or PurePosixPath(place).is_absolute():
            raise AdapterError(f"{_MODULES} names a folder elsewhere", path=folder, got=place)
        inside(folder, parts[0])
        files = sorted(child for child in (folder / place).rglob("*") if child.is_file())
        found += [child.relative_to(folder).as_posix() for child in files]
    return found
