"""Several adapters at once: which ones paths mean, and where the result of each goes."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from itertools import filterfalse
from pathlib import Path, PurePath

from loratools_formats.contract.file_kinds import not_weights
from loratools_formats.contract.registry import find_format, get_format
from loratools_formats.core.file_names import (
    ADAPTER_CONFIG,
    TRAINING_STATE,
    WEIGHT_ENDINGS,
    WEIGHTS_OF_ADAPTERS,
    WRITTEN_ENDINGS,
    may_be_adapter,
    without_ending,
)
from loratools_formats.disk.errors import AdapterError, LoratoolsError, OptionError
from loratools_formats.disk.files import is_closed
from loratools_formats.disk.provenance import PROVENANCE_FILE, RECIPE_FILE

_MOST_FOLDERS = 100_000
_HALVES = (ADAPTER_CONFIG, *WEIGHTS_OF_ADAPTERS)


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
        ending = get_format(target).ending
        leaves = [leaf.with_name(without_ending(leaf.name) + ending) for leaf in leaves]
    return {path: folder / leaf for path, leaf in zip(adapters, leaves, strict=True)}


def check_apart(outputs: Iterable[tuple[PurePath, object]]) -> None:
    """Raise `OptionError` if two outputs have one place, or one lies in another.

    Args:
        outputs: where each goes, and what it is made from.
    """
    taken: dict[PurePath, object] = {}
    for place, source in outputs:
        if place in taken:
            raise _clash("two would have the same output", taken[place], source)
        taken[place] = source
    for place, source in taken.items():
        for outer in place.parents:
            if outer in taken:
                raise _clash("the output of one would lie in that of another", taken[outer], source)


def _clash(problem: str, first: object, second: object) -> OptionError:
    return OptionError(
        problem,
        got=f"{first}, {second}",
        expected="an output for each",
        hint="Run it on each with another folder of outputs",
    )


def is_named_as_adapter(name: str) -> bool:
    """Return whether a file elsewhere is taken for an adapter that needs no folder, by its name."""
    return name.endswith(WRITTEN_ENDINGS) or may_be_adapter(name.rpartition("/")[2])


def adapters_in(paths: Sequence[Path]) -> list[Path]:
    """Return the adapters that paths mean, in order and each once.

    A path with wildcards stands for what it matches, and a folder that is no adapter for all
    adapters below it. Weight files that are broken, links to nothing, and folders that may not be
    looked into, are among these: whoever reads them says what is wrong. Hidden folders and links to
    folders are not entered. What lies beside an adapter's file and says how it was made is left
    out, since `*` in a shell names it as well.

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
            is_file = child.suffix in WEIGHT_ENDINGS and not TRAINING_STATE.fullmatch(child.name)
            if is_folder and is_closed(child):
                found += [child] if not child.name.startswith(".") else []
            elif ((is_folder or is_file) and is_adapter(child)) or _is_broken(child):
                found.append(child)
            elif is_folder and not child.name.startswith("."):
                pending.append(child)
    return sorted(found)


def _is_broken(path: Path) -> bool:
    """Return whether a path would be an adapter if the file were whole, or the link led anywhere.

    An empty file, a web page and what Git LFS leaves in place of a file are no weights.
    """
    if path.suffix not in (*WRITTEN_ENDINGS, "") or path.name.startswith("."):
        return False
    if not path.exists():
        return path.is_symlink()
    return path.suffix in WRITTEN_ENDINGS and not_weights(path) is not None


def is_adapter(path: Path) -> bool:
    """Return whether a format claims the path, or would if half of a PEFT folder were not lost."""
    if is_closed(path):
        return False
    if any((path / name).is_file() for name in _HALVES):
        return True
    try:
        find_format(path)
    except LoratoolsError:
        return False
    return True
