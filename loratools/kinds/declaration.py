"""How a kind of adapter is declared: its tensors, what it needs to know, and its ΔW.

A declaration gives ΔW in one of four forms, from the cheapest to the most general: two factors, a
Kronecker product, and rows or columns on demand. Everything else (ranks, rounding, errors, writing)
is the same for all kinds and lives elsewhere.

Shapes: ΔW is (out, in) in the orientation of `nn.Linear`, whatever the layer; convolutions are
flattened to (out, in·kernel), embeddings have the vocabulary as `in`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from loratools_formats.core.change import KindDelta, ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

Needs = Literal["nothing", "shape", "weight"]


@dataclass(frozen=True)
class Product:
    """ΔW = b @ a.

    Attributes:
        b: (out, r) float64.
        a: (r, in) float64.
    """

    b: Array
    a: Array


@dataclass(frozen=True)
class Kronecker:
    """ΔW = scale · left ⊗ right.

    Attributes:
        left: (p, q) float64.
        right: (out/p, in/q) float64.
        scale: multiplies the product.
    """

    left: Array
    right: Array
    scale: float


@dataclass(frozen=True)
class Rows:
    """ΔW of full rank, a block of rows at a time.

    Attributes:
        shape: (out, in).
        rows: returns rows [start, stop) in float64.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Array]


@dataclass(frozen=True)
class Columns:
    """ΔW of full rank, a block of columns at a time, for weights that are stored inputs first.

    Attributes:
        shape: (out, in).
        columns: returns columns [start, stop) as the rows of a matrix (stop − start, out) float64.
    """

    shape: tuple[int, int]
    columns: Callable[[int, int], Array]


DeltaForm = Product | Kronecker | Rows | Columns


def rows_in_groups(
    size: int, of_groups: Callable[[int, int], Array]
) -> Callable[[int, int], Array]:
    """Return what gives rows [start, stop), where only whole groups of rows can be computed.

    Args:
        size: rows in a group.
        of_groups: returns the rows of groups [first, last).
    """

    def rows(start: int, stop: int) -> Array:
        first = start // size
        whole = of_groups(first, -(-stop // size))
        return whole[start - first * size : stop - first * size]

    return rows


class Weight(Protocol):
    """The weight that a change belongs to, as a matrix (out, in).

    Attributes:
        shape: (out, in).
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop) of the base weight in float64.

        Raises:
            UnsupportedError: only its shape is known.
            AdapterError: NaN or infinite values.
        """

    def bias(self) -> Array | None:
        """Return the layer's bias in float64, None if it has none of its own.

        Raises:
            UnsupportedError: only the weight's shape is known.
            AdapterError: NaN or infinite values.
        """


@dataclass(frozen=True)
class Kind:
    """A kind of adapter.

    Attributes:
        name: what readers call it in `KindDelta.kind`.
        title: what people call it.
        source: paper or code that defines it.
        parts: names of the tensors that every module has, its own and shared ones.
        form: ΔW, given the tensors and the weight.
        optional: names of further tensors that a module may have.
        needs: what must be known of the base: `nothing`, the `shape` of the weight where the file
            does not determine it, or the `weight` itself.
        low_rank: whether it folds into two factors exactly.
        bias: returns the vector to add to the layer's bias, given that bias; None if it stays.
        magnitude: the magnitudes of a DoRA in the order of the outputs, given the stored ones;
            None if they are stored in that order.
        completed: returns the delta with its layer and shape, once no setting is missing; None if
            settings have no influence on these.
        caution: a warning that holds for every fold of the kind; empty if there is none.
        if_tied: why a plain LoRA on a tied embedding would make another change; empty if it would
            not.
    """

    name: str
    title: str
    source: str
    parts: tuple[str, ...]
    form: Callable[[KindDelta, Weight], DeltaForm]
    optional: tuple[str, ...] = ()
    needs: Needs = "nothing"
    low_rank: bool = True
    bias: Callable[[KindDelta, Weight, Array], Array] | None = None
    magnitude: Callable[[KindDelta, TensorRef], TensorRef] | None = None
    completed: Callable[[KindDelta], KindDelta] | None = None
    caution: str = ""
    if_tied: str = ""

    def knows(self, part: str) -> bool:
        """Return whether a module may have a part of that name; `*` stands for any number."""
        stem = part.rpartition(".")[0]
        return part in self.parts or part in self.optional or f"{stem}.*" in self.optional

    def magnitude_of(self, change: ModuleChange) -> TensorRef | None:
        """Return the magnitudes of a DoRA, one per output in their order; None if it is no DoRA."""
        stored, delta = change.magnitude, change.kind_delta
        if self.magnitude is None or stored is None or delta is None:
            return stored
        return self.magnitude(delta, stored)

    @property
    def folds_alone(self) -> bool:
        """Whether it folds exactly without a look at the base."""
        return self.low_rank and self.needs == "nothing"


class Tensors:
    """The tensors of a delta as float64 arrays, by the names of the declaration.

    Args:
        delta: whose tensors, own and shared.
    """

    def __init__(self, delta: KindDelta) -> None:
        self._refs = {**delta.shared, **delta.parts}

    def __contains__(self, name: str) -> bool:
        return name in self._refs

    def __getitem__(self, name: str) -> Array:
        """Return a tensor's values.

        Raises:
            AdapterError: NaN or infinite values.
        """
        ref = self._refs[name]
        values = ref.load(np.float64)
        if not np.isfinite(values).all():
            raise AdapterError("tensor holds NaN or infinite values", tensor=ref.key)
        return values

    def pair(self, end: str = "") -> tuple[Array, Array]:
        """Return the factors a (r, in) and b (out, r), whose names end so.

        Raises:
            AdapterError: they do not fit each other, or hold NaN or infinite values.
        """
        a, b = self[f"a{end}"], self[f"b{end}"]
        if b.shape[1] != len(a):
            raise self.wrong_shape(f"b{end}", f"(out, {len(a)})")
        return a, b

    def integers(self, name: str) -> Array:
        """Return a tensor of indices as int64.

        Raises:
            AdapterError: it holds fractions, or numbers that are no indices.
        """
        ref = self._refs[name]
        values = ref.load()
        whole = values.astype(np.int64)
        if not np.array_equal(whole.astype(values.dtype), values) or (whole < 0).any():
            raise AdapterError("tensor of indices holds other numbers", tensor=ref.key)
        return whole

    def wrong_shape(self, name: str, expected: str) -> AdapterError:
        """Return the error that a tensor does not fit."""
        ref = self._refs[name]
        return AdapterError(
            "tensor does not fit the others", tensor=ref.key, got=list(ref.shape), expected=expected
        )
