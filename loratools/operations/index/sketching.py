"""Rows of an index, from adapters that are read module by module.

The signs of a module are made once for a batch of adapters, and the factors of one module of one
adapter are in memory at a time and thread. A row depends on its adapter alone: whatever else is in
the batch, the bits are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loratools.algebra.sketch import BLOCKS, LENGTH, SIDE, blocks, signs, unit
from loratools.folding.thin_modules import ThinModules
from loratools.operations.compare.names import in_common_names
from loratools.operations.index.file import Entry, Row
from loratools.work.parallel import in_order
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError, LoratoolsError

_SCALE = 1.0 / (SIDE * BLOCKS**0.5)


@dataclass(frozen=True)
class Subject:
    """An adapter that is to be sketched.

    Attributes:
        path: as the index is to name it.
        digest: sha256 of its files.
        adapter: under names to which its other spellings lead, where a way leads there.
    """

    path: str
    digest: str
    adapter: Adapter

    @classmethod
    def of(cls, path: str, adapter: Adapter) -> Subject:
        """Return an adapter under the names by which it is sketched."""
        try:
            named = in_common_names(adapter)
        except LoratoolsError:
            named = adapter
        return cls(path, digest_of(adapter), named)


@dataclass(frozen=True)
class _Piece:
    """What one module adds to an adapter's row."""

    squared_norm: float
    sketch: Array
    a_squared_norm: float
    a_sketch: Array
    a_digest: bytes


Outcome = Row | LoratoolsError


def digest_of(adapter: Adapter) -> str:
    """Return the sha256 of the sha256 of each of an adapter's files."""
    together = hashlib.sha256()
    for file in adapter.inputs:
        together.update(file.sha256().encode())
    return together.hexdigest()


def rows(
    subjects: Sequence[Subject], workers: int, progress: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Return the row of each adapter, or why it has none.

    Args:
        subjects: some adapters, all of which are open at once.
        workers: threads over modules; results do not depend on it.
        progress: called after each module.
    """
    openers: list[ThinModules | LoratoolsError] = [_opener(one.adapter) for one in subjects]
    sums = [_Sums() for _ in subjects]
    names = sorted({n for o in openers if isinstance(o, ThinModules) for n in o.modules})

    def one(name: str) -> list[tuple[int, _Piece | LoratoolsError]]:
        return list(_pieces(name, openers))

    for name, found in zip(names, in_order(one, names, workers), strict=True):
        for place, piece in found:
            if isinstance(piece, LoratoolsError):
                openers[place] = piece
            else:
                sums[place].add(name, piece)
        progress()
    pairs = zip(subjects, openers, sums, strict=True)
    return [o if isinstance(o, LoratoolsError) else _row(s, o, total) for s, o, total in pairs]


class _Sums:
    """Adds up the modules of one adapter, in order."""

    def __init__(self) -> None:
        self.squared_norms: dict[str, float] = {}
        self.sketch, self.a_sketch = np.zeros(LENGTH), np.zeros(LENGTH)
        self.a_squared_norm = 0.0
        self.a_digest = hashlib.sha256()

    def add(self, name: str, piece: _Piece) -> None:
        """Add a module."""
        self.squared_norms[name] = piece.squared_norm
        self.sketch += piece.sketch
        self.a_sketch += piece.a_sketch
        self.a_squared_norm += piece.a_squared_norm
        self.a_digest.update(name.encode() + b"\n" + piece.a_digest)


def _opener(adapter: Adapter) -> ThinModules | LoratoolsError:
    try:
        return ThinModules(adapter, None, "index")
    except LoratoolsError as error:
        return error


def _pieces(
    name: str, openers: Sequence[ThinModules | LoratoolsError]
) -> Iterator[tuple[int, _Piece | LoratoolsError]]:
    made: dict[tuple[str, str, int], Array] = {}

    def drawn(module: str, side: str, count: int) -> Array:
        key = (module, side, count)
        if key not in made:
            made[key] = signs(module, side, count)
        return made[key]

    for place, opener in enumerate(openers):
        if isinstance(opener, LoratoolsError) or name not in opener.modules:
            continue
        try:
            yield place, _piece(name, opener, drawn)
        except LoratoolsError as error:
            yield place, error


def _piece(name: str, opener: ThinModules, drawn: Callable[[str, str, int], Array]) -> _Piece:
    opened = opener.open(name)
    factors = opener.modules[name].factors
    sketch, a_sketch, squared, a_squared = np.zeros(LENGTH), np.zeros(LENGTH), 0.0, 0.0
    for place, thin in enumerate(opened.matrices):
        module = name if len(opened.matrices) == 1 else f"{name}#{place}"
        out, in_ = thin.shape
        right = _products(thin.a, drawn(module, "in", in_))
        left = _products(thin.b.T, drawn(module, "out", out))
        sketch += thin.scale * _SCALE * blocks(left, right)
        squared += thin.squared_norm
        if factors is not None:
            a_sketch += _SCALE * blocks(drawn(module, "rank", thin.rank), right)
            a_squared += float(np.sum(np.square(thin.a, dtype=np.float64)))
    if not np.isfinite(sketch).all() or not np.isfinite(squared):
        raise AdapterError("squares of the factors overflow float64", tensor=name)
    return _Piece(squared, sketch, a_squared, a_sketch, _bits(factors))


def _products(rows_of: Array, columns: Array) -> Array:
    """Return rows @ signs: (r, 256), in float64 where the rows are."""
    product: Array = np.ascontiguousarray(rows_of) @ columns
    return product


def _bits(factors: LowRank | None) -> bytes:
    """Return what tells one A from another: its type, shape and bits."""
    if factors is None:
        return b""
    head = f"{factors.a.dtype.code} {list(factors.a.shape)}".encode()
    return hashlib.sha256(head + bytes(factors.a.raw())).digest()


def _row(subject: Subject, opener: ThinModules, sums: _Sums) -> Outcome:
    squares = {name: square for name, square in sums.squared_norms.items() if square > 0.0}
    norm = float(np.sqrt(sum(squares.values())))
    if not norm > 0.0:
        return AdapterError("the adapter changes nothing", path=opener.adapter.source)
    ranks = [change.rank or 0 for change in opener.modules.values()]
    entry = Entry(
        path=subject.path,
        digest=subject.digest,
        a_digest=sums.a_digest.hexdigest() if sums.a_squared_norm > 0.0 else "",
        norm=norm,
        rank=max(ranks),
        modules=len(opener.modules),
        base_model=opener.adapter.base_model,
        directional=opener.directional,
    )
    sketch, a_sketch = (unit(each).astype(np.float32) for each in (sums.sketch, sums.a_sketch))
    return Row(entry, sketch, a_sketch, squares)
