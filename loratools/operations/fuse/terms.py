"""From placed deltas to terms: what is added to which rectangle of which stored matrix.

Stored tensors of any layout are seen as `planes` matrices of (rows, columns), row-major as they
lie in the file: outputs are rows, or columns where the tensor is stored as (in, out). A delta
becomes left @ right on a rectangle of one plane. This is the only place that knows how outputs,
rows of factors, experts and layouts fit together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratools.base.placement import BiasPlacement, Placement, Span
from loratools.kinds.declaration import Rows
from loratools.operations.fuse.streamed import StreamedPlacement
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import Array, converted
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.core.orientation import OTHER_BASE
from loratools_formats.disk.errors import AdapterError


@dataclass(frozen=True)
class WeightedChange:
    """One adapter's change of one tensor, with the adapter's weight."""

    placement: Placement | BiasPlacement | StreamedPlacement
    weight: float


@dataclass(frozen=True)
class View:
    """A stored tensor as a stack of matrices."""

    planes: int
    rows: int
    columns: int

    @classmethod
    def of(cls, shape: tuple[int, ...], changes: Sequence[WeightedChange]) -> View:
        """Return the view of (out, in), (out, in, *kernel), (n,), or of a stack of experts.

        Changes of a convolution see one matrix, whatever the number of axes.
        """
        if len(shape) < 2:
            return cls(1, math.prod(shape), 1)
        is_stack = any(
            isinstance(change.placement, Placement)
            and change.placement.delta.require_factors().layer.kind != "conv"
            for change in changes
        )
        if is_stack and len(shape) == 3:
            return cls(shape[0], shape[1], math.prod(shape[2:]))
        return cls(1, shape[0], math.prod(shape[1:]))


@dataclass(frozen=True)
class DoraTerm:
    """A DoRA's part of a term.

    Attributes:
        magnitude: (outputs,) float64.
        along_columns: whether outputs are columns, so that norms run over rows.
    """

    magnitude: Array
    along_columns: bool


@dataclass(frozen=True)
class Term:
    """weight · left @ right, or what a DoRA makes of it, added to a rectangle of a matrix.

    Attributes:
        module: the adapter's module, for messages.
        plane: which matrix.
        rows: rows of the rectangle.
        columns: columns of the rectangle.
        left: (rows, r) float64, or float32 that holds the stored numbers exactly.
        right: (r, columns) the same; the delta's scale is folded into one of them.
        weight: the adapter's.
        dora: None for a product.
    """

    module: str
    plane: int
    rows: Span
    columns: Span
    left: Array
    right: Array
    weight: float
    dora: DoraTerm | None = None

    @property
    def is_product(self) -> bool:
        """Whether it is a product, whatever the weights are."""
        return self.dora is None


@dataclass(frozen=True)
class RowsTerm:
    """weight · a change known by rows, added to a rectangle of a matrix.

    Attributes:
        module: the adapter's module, for messages.
        plane: which matrix.
        rows: rows of the rectangle.
        columns: columns of the rectangle.
        values: what is added, by rows of the rectangle in float64.
        weight: the adapter's.
    """

    module: str
    plane: int
    rows: Span
    columns: Span
    values: Rows
    weight: float
    is_product: bool = False


def load_terms(changes: Sequence[WeightedChange], view: View) -> list[list[Term | RowsTerm]]:
    """Load the factors of all changes of a tensor; returns the terms of each plane.

    Raises:
        AdapterError: factors hold NaN or infinite values, or do not fit the tensor.
    """
    terms = [term for change in changes for term in _terms(change, view)]
    return [_joined([t for t in terms if t.plane == plane]) for plane in range(view.planes)]


def _terms(change: WeightedChange, view: View) -> list[Term] | list[RowsTerm]:
    placement = change.placement
    if isinstance(placement, StreamedPlacement):
        return [_streamed_term(placement, change.weight, view)]
    if isinstance(placement, BiasPlacement):
        return _bias_terms(placement, change.weight, view)
    part = placement.delta.require_factors()
    a, b = _loaded(part, placement)
    found: list[Term] = []
    for index in range(len(a)):
        plane = index if placement.plane is None else placement.plane
        rows = _picked(b[index], placement.rows)
        magnitude = _magnitude(placement)
        for outputs, span in _aligned(placement.outputs, len(rows)):
            dora = None
            if magnitude is not None:
                picked = _picked(magnitude, placement.rows)[span[0] : span[1]]
                dora = DoraTerm(picked, placement.transposed)
            left, right = rows[span[0] : span[1]], a[index]
            if part.scale != 1.0:  # on the smaller one: that of a large vocabulary is not copied
                if left.size <= right.size:
                    left = part.scale * _wide(left)
                else:
                    right = part.scale * _wide(right)
            if placement.transposed:
                left, right = right.T, left.T
            lines, others = (0, left.shape[0]), (0, right.shape[1])
            cut = (lines, outputs) if placement.transposed else (outputs, others)
            found.append(
                Term(placement.module, plane, cut[0], cut[1], left, right, change.weight, dora)
            )
    for term in found:
        _check_fit(term, view, complete=term.dora is not None)
    return found


def _streamed_term(placement: StreamedPlacement, weight: float, view: View) -> RowsTerm:
    values = placement.rows()
    outputs, others = placement.outputs, (0, values.shape[1])
    if not placement.piece.transposed:
        rows, columns = outputs, others
    else:
        whole = values.rows(0, values.shape[0]).T
        values = Rows((whole.shape[0], whole.shape[1]), lambda start, stop: whole[start:stop])
        rows, columns = others, outputs
    if rows[1] > view.rows or columns[1] > view.columns or view.planes != 1:
        raise AdapterError(
            "the delta does not fit the base weight",
            tensor=placement.module,
            got=f"rows {list(rows)}, columns {list(columns)}",
            expected=f"inside {view.planes} × {view.rows} × {view.columns}",
            hint=OTHER_BASE,
        )
    return RowsTerm(placement.module, 0, rows, columns, values, weight)


def _loaded(part: LowRank, placement: Placement) -> tuple[Array, Array]:
    """Return a (E, r, in) and b (E, out, r), exact; one expert only if one is placed."""
    arrays = []
    for tensor in (part.a, part.b):
        stored = tensor.load()
        stored = stored.reshape(-1, *stored.shape[-2:])
        if placement.expert is not None:
            stored = stored[placement.expert : placement.expert + 1]
        wide = tensor.dtype.code == "F64"
        values = converted(stored, np.float64 if wide else np.float32)
        if not np.isfinite(values).all():
            raise AdapterError(NOT_FINITE, tensor=tensor.key)
        arrays.append(values)
    return arrays[0], arrays[1]


def _magnitude(placement: Placement) -> Array | None:
    magnitude = placement.delta.magnitude
    if magnitude is None:
        return None
    values: Array = magnitude.load(np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise AdapterError("magnitude holds NaN or infinite values", tensor=magnitude.key)
    return values


def _bias_terms(placement: BiasPlacement, weight: float, view: View) -> list[Term]:
    values = placement.bias.load(np.float64).reshape(-1)
    if not np.isfinite(values).all():
        raise AdapterError(
            "bias of factors holds NaN or infinite values", tensor=placement.bias.key
        )
    rows = placement.scale * _picked(values, placement.rows)
    if view.columns > 1:  # a parameter of several dimensions
        size = view.rows, view.columns
        sides = np.eye(size[0]), rows.reshape(size)
        if size[0] > size[1]:
            sides = rows.reshape(size), np.eye(size[1])
        return [Term(placement.module, 0, (0, size[0]), (0, size[1]), *sides, weight)]
    one = np.ones((1, 1))
    found = [
        Term(placement.module, 0, outputs, (0, 1), rows[span[0] : span[1], None], one, weight)
        for outputs, span in _aligned(placement.outputs, len(rows))
    ]
    for term in found:
        _check_fit(term, view, complete=False)
    return found


def _picked(values: Array, spans: tuple[Span, ...]) -> Array:
    """Return the listed rows of an array; all of them if the list is empty."""
    if not spans:
        return values
    return np.concatenate([values[start:stop] for start, stop in spans])


def _aligned(outputs: tuple[Span, ...], count: int) -> list[tuple[Span, Span]]:
    """Pair each span of outputs with the rows of the delta that go there, taken in order."""
    pairs, position = [], 0
    for start, stop in outputs or ((0, count),):
        pairs.append(((start, stop), (position, position + stop - start)))
        position += stop - start
    if position != count:
        raise AdapterError("placed outputs and rows differ in number", got=count, expected=position)
    return pairs


def _check_fit(term: Term, view: View, *, complete: bool) -> None:
    size = term.left.shape[0], term.right.shape[1]
    wanted = term.rows[1] - term.rows[0], term.columns[1] - term.columns[0]
    inside = (
        0 <= term.plane < view.planes
        and term.rows[1] <= view.rows
        and term.columns[1] <= view.columns
    )
    along = term.rows if term.dora is not None and term.dora.along_columns else term.columns
    full = view.rows if term.dora is not None and term.dora.along_columns else view.columns
    if size != wanted or not inside or (complete and along != (0, full)):
        raise AdapterError(
            "the delta does not fit the base weight",
            tensor=term.module,
            got=f"rows {list(term.rows)}, columns {list(term.columns)}",
            expected=f"inside {view.planes} × {view.rows} × {view.columns}",
            hint=OTHER_BASE,
        )


def _joined(terms: list[Term | RowsTerm]) -> list[Term | RowsTerm]:
    """Join product terms of one rectangle, so that one product stands for all of them."""
    groups: dict[tuple[Span, Span], list[Term]] = {}
    others = [term for term in terms if not term.is_product]
    for term in terms:
        if isinstance(term, Term) and term.is_product:
            groups.setdefault((term.rows, term.columns), []).append(term)
    joined: list[Term | RowsTerm] = []
    for (rows, columns), group in groups.items():
        lefts = [t.left if t.weight == 1.0 else t.weight * _wide(t.left) for t in group]
        rights = [t.right for t in group]
        # One alone is not copied: factors of a large vocabulary take most of the memory.
        left = lefts[0] if len(group) == 1 else np.concatenate(lefts, axis=1)
        right = rights[0] if len(group) == 1 else np.concatenate(rights, axis=0)
        joined.append(Term(group[0].module, group[0].plane, rows, columns, left, right, 1.0))
    return joined + others


def _wide(values: Array) -> Array:
    return values.astype(np.float64, copy=False)
