"""The file of an index: one safetensors file, whose rows are adapters.

- `sketch`: (N, 4096) F32, of ΔW, each of length 1
- `a_sketch`: (N, 4096) F32, of the A factors as stored, of length 1; zeros of adapters without A
- `shares`: (N, M) F32, share of ‖ΔW‖² in each module

What the rows and the M columns are is in the metadata entry `loratools_index`, as JSON.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loratools.algebra.sketch import LENGTH, SCHEME
from loratools_formats.containers.safetensors_read import SafetensorsFile, read_safetensors
from loratools_formats.containers.safetensors_write import safetensors_nbytes, write_safetensors
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError, LoratoolsError, UnsupportedError

METADATA_KEY = "loratools_index"
VERSION = 2
_TENSORS = ("sketch", "a_sketch", "shares")
_MOST_VALUES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One adapter of an index.

    Attributes:
        path: where it lies, from the folder of the index.
        digest: sha256 of its files.
        a_digest: sha256 of its A factors; empty if it has none.
        norm: ‖ΔW‖_F.
        rank: the largest of its modules; 0 if it has no factors.
        modules: number of its modules.
        base_model: as recorded; None if it is not.
        directional: whether it is a DoRA, of which the direction is sketched.
    """

    path: str
    digest: str
    a_digest: str
    norm: float
    rank: int
    modules: int
    base_model: str | None
    directional: bool


@dataclass(frozen=True)
class Row:
    """What is known of one adapter.

    Attributes:
        entry: what it is.
        sketch: (4096,) float32 of length 1.
        a_sketch: (4096,) float32 of length 1, or zeros.
        squared_norms: ‖ΔW‖² by module.
    """

    entry: Entry
    sketch: Array
    a_sketch: Array
    squared_norms: Mapping[str, float]


@dataclass(frozen=True)
class Index:
    """An index in memory.

    Attributes:
        entries: one for each row.
        modules: the names of the columns of `shares`.
        sketch: (N, 4096) float32.
        a_sketch: (N, 4096) float32.
        shares: (N, M) float32.
    """

    entries: tuple[Entry, ...]
    modules: tuple[str, ...]
    sketch: Array
    a_sketch: Array
    shares: Array

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Index:
        """Return the index of rows."""
        modules = tuple(sorted({name for row in rows for name in row.squared_norms}))
        columns = {name: place for place, name in enumerate(modules)}
        shares = np.zeros((len(rows), len(modules)), np.float32)
        for place, row in enumerate(rows):
            whole = sum(row.squared_norms.values())
            for name, square in row.squared_norms.items():
                shares[place, columns[name]] = square / whole if whole else 0.0
        wide = np.zeros((0, LENGTH), np.float32)
        return cls(
            tuple(row.entry for row in rows),
            modules,
            np.concatenate([wide, *(row.sketch[None] for row in rows)]),
            np.concatenate([wide, *(row.a_sketch[None] for row in rows)]),
            shares,
        )

    def row(self, place: int) -> Row:
        """Return what is known of one adapter."""
        entry = self.entries[place]
        present = np.flatnonzero(self.shares[place])
        squares = {self.modules[i]: float(self.shares[place, i]) * entry.norm**2 for i in present}
        return Row(entry, self.sketch[place], self.a_sketch[place], squares)

    def shares_of(self, row: Row) -> Array:
        """Return the shares of another adapter in the modules of the index: (1, M)."""
        whole = sum(row.squared_norms.values()) or 1.0
        return np.array([[row.squared_norms.get(name, 0.0) / whole for name in self.modules]])

    def tensors(self) -> list[TensorRef]:
        """Return what the file holds."""
        return [in_memory(name, getattr(self, name), "F32") for name in _TENSORS]

    def metadata(self) -> dict[str, str]:
        """Return what the file says of its rows and columns."""
        whole = {
            "version": VERSION,
            "scheme": SCHEME,
            "modules": list(self.modules),
            "adapters": [asdict(entry) for entry in self.entries],
        }
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return {METADATA_KEY: text}

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return safetensors_nbytes(self.tensors(), self.metadata())

    def write(self, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputExistsError: it exists and `overwrite` is false.
            OutputError: it could not be written.
        """
        write_safetensors(path, self.tensors(), self.metadata(), overwrite=overwrite)


def read_index(path: str | os.PathLike[str]) -> Index:
    """Read an index.

    Raises:
        MissingFileError: nothing is there.
        AdapterError: not a sound index.
        UnsupportedError: of another version.
    """
    if os.path.isdir(path):
        hint = f"Make one of it: loratools fleet index {shlex.quote(os.fspath(path))} -o INDEX"
        raise AdapterError("is a folder; expected an index of adapters", path=path, hint=hint)
    opened = read_safetensors(path)
    try:
        return _parsed(opened, Path(path))
    except LoratoolsError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"not a sound index: {error}", path=path, hint=_AGAIN) from error
    finally:
        opened.file.close()


_AGAIN = "Make it again: loratools fleet index ADAPTERS -o index.safetensors"


def _parsed(opened: SafetensorsFile, path: Path) -> Index:
    if METADATA_KEY not in opened.metadata:
        raise AdapterError("is no index of adapters", path=path, hint=_AGAIN)
    text = opened.metadata[METADATA_KEY].encode()
    found: Any = strict_json.loads(
        text, max_depth=8, most_values=_MOST_VALUES, with_surrogates=True
    )
    if (found["version"], found["scheme"]) != (VERSION, SCHEME):
        raise UnsupportedError(
            "the index is of another version",
            path=path,
            got=f"{found['version']}, {found['scheme']}",
            expected=f"{VERSION}, {SCHEME}",
            hint=_AGAIN,
        )
    entries = tuple(_entry(each) for each in found["adapters"])
    modules = tuple(str(name) for name in found["modules"])
    shapes = ((len(entries), LENGTH), (len(entries), LENGTH), (len(entries), len(modules)))
    arrays = []
    for name, shape in zip(_TENSORS, shapes, strict=True):
        tensor = opened.tensors[name]
        if tensor.shape != shape or tensor.dtype.code != "F32":
            raise ValueError(f"{name} of {tensor.dtype.code} {list(tensor.shape)}")
        arrays.append(tensor.load())
        if not np.isfinite(arrays[-1]).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    return Index(entries, modules, *arrays)


def _entry(given: Mapping[str, Any]) -> Entry:
    entry = Entry(**given)
    texts = (entry.path, entry.digest, entry.a_digest, entry.base_model or "")
    numbers = (entry.norm, entry.rank, entry.modules)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("an adapter's path or digest is no text")
    if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
        raise TypeError("an adapter's norm or rank is no number")
    return entry
