"""Several adapters at once: which ones paths mean, and where the result of each goes."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from itertools import filterfalse
from pathlib import Path

from loratools_formats.contract.file_kinds import not_weights
from loratools_formats.contract.registry import find_format, get_format
from loratools_formats.disk.errors import AdapterError, LoratoolsError
from loratools_formats.disk.provenance import PROVENANCE_FILE, RECIPE_FILE

_MOST_FOLDERS = 100_000
_HALVES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHTS = (".safetensors", ".gguf")
"""Endings of weight files, which an output in another format loses."""


def outputs_below(folder: Path, adapters: Sequence[Path], target: str | None) -> dict[Path, Path]:
    """Return where each result goes in a folder: under its name, or its path below what all share.

    Args:
        folder: of results.
        adapters: what is read, each once.
        target: the format, if results are converted to one; it decides the suffix.
    """
    names = [Path(os.path.abspath(path)) for path in adapters]
    leaves = [Path(path.name) for path in names]
    if len(set(leaves)) < len(leaves):
        common = os.path.commonpath([path.parent for path in names])
        leaves = [path.relative_to(common) for path in names]
    if target is not None:
        to = get_format(target)
        suffix = "" if to.is_folder else (*to.suffixes, WEIGHTS[0])[0]
        leaves = [leaf.with_name(_stem(leaf) + suffix) for leaf in leaves]
    return {path: folder / leaf for path, leaf in zip(adapters, leaves, strict=True)}


def _stem(leaf: Path) -> str:
    return leaf.stem if leaf.suffix in WEIGHTS else leaf.name


def adapters_in(paths: Sequence[Path]) -> list[Path]:
    """Return the adapters that paths mean, in order and each once.

    A path with wildcards stands for what it matches, and a folder that is no adapter for all
    adapters below it. Weight files that are broken, and links to nothing, are among these: whoever
    reads them says what is wrong. Hidden folders and links to folders are not entered. What lies
    beside an adapter's file and says how it was made is left out, since `*` in a shell names it as
    well.

    Raises:
        AdapterError: wildcards match nothing.
    """
    found: dict[Path, None] = {}
    for path in paths:
        matches = [path]
        if glob.has_magic(str(path)) and not path.exists():
            matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
            if not matches:
                raise AdapterError("nothing matches", path=path)
        for match in filterfalse(_belongs_to_file, matches):
            inner = [] if not match.is_dir() or is_adapter(match) else _below(match)
            found |= dict.fromkeys(inner or [match])
    return list(found)


def _belongs_to_file(path: Path) -> bool:
    """Return whether a path is the statement or the recipe that lies beside an adapter's file."""
    ends = (f".{PROVENANCE_FILE}", f".{RECIPE_FILE}")
    return any(
        path.name.endswith(end) and path.with_name(path.name.removesuffix(end)).is_file()
        for end in ends
    )


def _below(folder: Path) -> list[Path]:
    found, pending, looked_at = [], [folder], 0
    while pending and looked_at < _MOST_FOLDERS:
        here = pending.pop()
        for child in sorted(here.iterdir()):
            looked_at += 1
            is_folder = child.is_dir() and not child.is_symlink()
            may_be = is_folder or child.suffix in WEIGHTS
            if (may_be and is_adapter(child)) or _is_broken(child):
                found.append(child)
            elif is_folder and not child.name.startswith("."):
                pending.append(child)
    return sorted(found)


def _is_broken(path: Path) -> bool:
    """Return whether a path would be an adapter if the file were whole, or the link led anywhere.

    An empty file, a web page and what Git LFS leaves in place of a file are no weights.
    """
    if path.suffix not in (*WEIGHTS, "") or path.name.startswith("."):
        return False
    if not path.exists():
        return path.is_symlink()
    return path.suffix in WEIGHTS and not_weights(path) is not None


def is_adapter(path: Path) -> bool:
    """Return whether a format claims the path, or would if half of a PEFT folder were not lost."""
    if any((path / name).is_file() for name in _HALVES):
        return True
    try:
        find_format(path)
    except LoratoolsError:
        return False
    return True
