"""What all adapters of a fleet share: base models are opened once in each process.

Their headers and configuration stay read. Decompositions of base weights are kept in one folder for
all processes, among the outputs while the run lasts, where an operation can use them.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from loratools.pipeline.fleet.store import OWN, Store
from loratools.pipeline.fleet.stores import Folder
from loratools.pipeline.fleet.verbs import Verb
from loratools_formats.checkpoints.checkpoint import Checkpoint, read_checkpoint
from loratools_formats.disk.errors import LoratoolsError


def shared_inputs(verb: Verb, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base models among settings, opened already, by parameter."""
    found: dict[str, Any] = {}
    for name, want in verb.inputs.items():
        value = settings.get(name)
        takes_opened = Checkpoint in get_args(verb.declaration.inputs[name])
        if want != "model" or not isinstance(value, str) or not takes_opened:
            continue
        opened = _opened(value, _changed_ns(value)) if os.path.isdir(value) else None
        if opened is not None:
            found[name] = opened
    return found


def decompositions(store: Folder) -> Path:
    """Return the folder where a run keeps decompositions of base weights."""
    return store.path / OWN / "base"


def forget_decompositions(store: Store) -> None:
    """Take the decompositions of base weights away; who needs one still computes it again."""
    if isinstance(store, Folder):
        shutil.rmtree(decompositions(store), ignore_errors=True)


def _changed_ns(path: str) -> tuple[int, ...]:
    """Return when the files of a folder were last changed."""
    return tuple(entry.stat().st_mtime_ns for entry in sorted(os.scandir(path), key=str))


@functools.lru_cache(maxsize=2)
def _opened(path: str, changed_ns: tuple[int, ...]) -> Checkpoint | None:  # noqa: ARG001 - a key
    """Return an opened checkpoint; None if the path is another kind of model."""
    try:
        return read_checkpoint(Path(path))
    except LoratoolsError:
        return None
