"""An output that was made again, beside the first: which bytes and numbers differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.disk.errors import LoratoolsError
from loratools_formats.disk.provenance import PROVENANCE_FILE, RECIPE_FILE, sha256_of

NAMES_PATHS = frozenset({RECIPE_FILE})
"""Files whose content depends on where they lie."""


@dataclass(frozen=True)
class ReplayedFile:
    """A file that was made twice.

    Attributes:
        name: its name.
        sha256: of the one that was made first; None if it is not there.
        sha256_again: of the other; None if it was not made again.
        identical: whether they are equal.
        difference: largest ‖T − T'‖/‖T‖ of a tensor; 0 if only metadata differ, None if the files
            are equal or their tensors cannot be compared.
        tensor: the tensor that differs most.
    """

    name: str
    sha256: str | None
    sha256_again: str | None
    identical: bool
    difference: float | None
    tensor: str | None


def compared(
    first: Path, again: Path, statement: Mapping[str, Any]
) -> tuple[tuple[ReplayedFile, ...], tuple[str, ...]]:
    """Return what became of every file, and the files that were not compared.

    Args:
        first: the output that was made once.
        again: the output that was made now.
        statement: about the first, which lists its files.
    """
    if not again.is_dir():
        return (_file(first.name, first, again),), ()
    listed = {str(one.get("name")) for one in statement["subject"]}
    made = {
        path.relative_to(again).as_posix()
        for path in again.rglob("*")
        if path.is_file() and path.name != PROVENANCE_FILE and path.suffix != ".md"
    }
    names = sorted(listed | made)
    files = [_file(name, first / name, again / name) for name in names if name not in NAMES_PATHS]
    return tuple(files), tuple(name for name in names if name in NAMES_PATHS)


def _file(name: str, first: Path, again: Path) -> ReplayedFile:
    digests = [sha256_of(path) if path.is_file() else None for path in (first, again)]
    identical = digests[0] == digests[1]
    difference, tensor = (None, None) if identical else _difference(first, again)
    return ReplayedFile(name, digests[0], digests[1], identical, difference, tensor)


def _difference(first: Path, again: Path) -> tuple[float | None, str | None]:
    """Return how far the tensors of two files are apart; None if they are not alike."""
    try:
        one, other = read_safetensors(first).tensors, read_safetensors(again).tensors
    except LoratoolsError:
        return None, None
    shapes = [{key: (ref.shape, ref.dtype) for key, ref in refs.items()} for refs in (one, other)]
    if shapes[0] != shapes[1]:
        return None, None
    return max(_distances(one, other), default=(0.0, None), key=lambda pair: pair[0])


def _distances(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[float, str]]:
    for key, ref in one.items():
        if bytes(ref.raw()) == bytes(other[key].raw()):
            continue
        a, b = ref.load(np.float64), other[key].load(np.float64)
        whole = float(np.linalg.norm(a))
        apart = float(np.linalg.norm(a - b))
        yield (apart / whole if whole else float(apart > 0)), key
    yield 0.0, ""
