"""What a run has done: for each step the key of its content, and the digests of its result.

A step is done if its key is the same (operation, options, version, digests of what it reads) and
its result is still what it was. The key is written before a step begins, without digests, so that
what a killed process left is known as ours and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools import __version__
from loratools_formats.disk.errors import AdapterError, LoratoolsError, MissingFileError
from loratools_formats.disk.hub_cache import cached_place
from loratools_formats.disk.provenance import sha256_of, statement_place
from loratools_formats.disk.publish import publish_file
from loratools_formats.disk.strict_json import read_object

STATE_FOLDER = ".loratools-recipe"
_MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class StepState:
    """What is known of a step from an earlier run.

    Attributes:
        key: of its content.
        files: digests of its result's files; None if it did not end.
    """

    key: str
    files: Mapping[str, str] | None


def content_key(operation: str, values: Mapping[str, Any]) -> str:
    """Return the key of a step: equal keys mean equal bytes.

    Args:
        operation: what it does.
        values: its options, the digests of what it reads, and the name of its result.
    """
    content = {"operation": operation, "version": __version__, **values}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digests(path: Path) -> dict[str, str]:
    """Return what decides what is read from a path: digests of its files by their names.

    A place in the cache of the Hub is named by its commit; its files may not all be here.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: a file cannot be read.
    """
    place = cached_place(path)
    if place is not None and place.commit is not None:
        return {"": place.reference}
    if not path.is_dir():
        beside = [statement_place(path)]
        return {"": sha256_of(path), **{p.name: sha256_of(p) for p in beside if p.is_file()}}
    found: dict[str, str] = {}
    for root, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(root) / name
            if not name.startswith("."):
                found[file.relative_to(path).as_posix()] = sha256_of(file)
    return found


def read_state(folder: Path, name: str) -> StepState | None:
    """Return what an earlier run says of a step; None if it says nothing sound."""
    try:
        content = read_object(_place(folder, name), _MOST_BYTES, name="state")
    except (MissingFileError, AdapterError):
        return None
    key, files = content.get("key"), content.get("files")
    if not isinstance(key, str) or not (files is None or isinstance(files, dict)):
        return None
    return StepState(key, files)


def write_state(folder: Path, name: str, state: StepState) -> None:
    """Write what is known of a step, whole or not at all.

    Raises:
        OutputError: it could not be written.
    """
    place = _place(folder, name)
    place.parent.mkdir(exist_ok=True)
    text = json.dumps({"files": state.files, "key": state.key}, indent=1, sort_keys=True)
    with publish_file(place, overwrite=True) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def restore_state(folder: Path, name: str, before: StepState | None) -> None:
    """Take back that a step began, if that can be written: it failed and made nothing."""
    with contextlib.suppress(LoratoolsError, OSError):
        if before is not None:
            write_state(folder, name, before)
            return
        place = _place(folder, name)
        place.unlink()
        place.parent.rmdir()  # if it is empty


def is_done(state: StepState | None, key: str, output: Path | None) -> bool:
    """Whether a step need not run again: same key, and its result is what it was."""
    if state is None or state.key != key or state.files is None:
        return False
    if output is None:
        return True
    try:
        return digests(output) == dict(state.files)
    except LoratoolsError:
        return False


def _place(folder: Path, name: str) -> Path:
    return folder / STATE_FOLDER / f"{name}.json"
