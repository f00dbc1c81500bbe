"""Which files of an output are published: those that loratools knows, and never what lies by them.

An allow-list cannot ship a token, an optimizer's state or a note that somebody left in the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratools_formats.checkpoints.checkpoint import CONFIG_FILE, read_checkpoint
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.attachments import ATTACHMENTS
from loratools_formats.core.file_names import CARD
from loratools_formats.disk.files import inside
from loratools_formats.disk.provenance import PROVENANCE_FILE, RECIPE_FILE

PICTURE = "spectrum.png"
_LOCAL_PATH = re.compile(rb"^\s*(?:- )?\{?(?:path|base): *+(?![\"']?hf:/)", re.MULTILINE)
_LARGEST_RECIPE = 1 << 20


@dataclass(frozen=True)
class Contents:
    """What of an output is published.

    Attributes:
        files: paths here, by their names in the repository's folder; without the card.
        card: its card, None if it has none.
        left_out: names of files in its folder that are not published.
    """

    files: Mapping[str, Path]
    card: Path | None
    left_out: tuple[str, ...]


def contents_of_adapter(path: Path, adapter: Adapter) -> Contents:
    """Return what is published of an adapter that was read from a path."""
    if not path.is_dir() and not get_format(adapter.format).is_folder:
        return _of_file(path)
    folder = path if path.is_dir() else path.parent  # weights whose configuration is beside them
    names = [os.path.relpath(file.path, folder) for file in adapter.inputs]
    names += [name for name, kept in adapter.attachments.items() if isinstance(kept, Path)]
    return _of_folder(folder, names)


def contents_of_model(path: Path) -> Contents:
    """Return what is published of a model: a folder of safetensors, or a GGUF file.

    Raises:
        LoratoolsError: it is no model.
    """
    if path.is_file() and is_gguf(path):
        first = _of_file(path)
        splits = {part.file.path.name: part.file.path for part in read_model(path).parts}
        return Contents({**splits, **first.files}, None, ())
    base = read_checkpoint(path)
    if not path.is_dir():
        return _of_file(path)
    names = [os.path.relpath(shard.file.path, path) for shard in base.files]
    return _of_folder(path, [*names, base.index_file, CONFIG_FILE])


def _of_file(path: Path) -> Contents:
    beside = [f"{path.name}.{PROVENANCE_FILE}", f"{path.name}.{RECIPE_FILE}"]
    found = {name: path.parent / name for name in beside if (path.parent / name).is_file()}
    found = {name: place for name, place in found.items() if _is_public(place)}
    return Contents({path.name: path, **found}, None, ())


def _of_folder(folder: Path, known: Iterable[str]) -> Contents:
    wanted = [*known, *ATTACHMENTS, PROVENANCE_FILE, RECIPE_FILE]
    files = {
        name: inside(folder, name)
        for name in dict.fromkeys(wanted)
        if name != CARD and (folder / name).is_file() and _is_public(folder / name)
    }
    card = inside(folder, CARD) if (folder / CARD).is_file() else None
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return Contents(files, card, tuple(sorted(here - set(files) - {CARD, PICTURE})))


def _is_public(path: Path) -> bool:
    """Return whether a file says nothing of this machine: a recipe may name folders here."""
    if not path.name.endswith(RECIPE_FILE):
        return True
    if path.stat().st_size > _LARGEST_RECIPE:
        return False
    return _LOCAL_PATH.search(path.read_bytes()) is None
