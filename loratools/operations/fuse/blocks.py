"""W + ΔW of one stored tensor, a block of rows at a time.

In float32 where a large tensor is rounded to 16 bits anyway, or quantised, in float64 otherwise and
for DoRA. In float32 a sum may cancel: entries so small that the rounding errors of the product
could show in the type to store are found by a bound, computed again in float64 and rounded once, as
is the whole of a block where many are small beside it. What remains is that some 3 in 100,000
entries of a bfloat16, 1 in 10,000 of a float16, which lie next to a tie, take the other neighbour;
of the largest changes that are not left to float64, 6 in 100,000 and 1.4 in 10,000.

Blocks of 2^19 elements were measured fastest: larger ones leave the processor's cache, and with
smaller ones threads wait for each other more often.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratools.algebra.device import Device, to_numpy
from loratools.operations.fuse.terms import DoraTerm, RowsTerm, Term, View
from loratools.work.buffers import Buffers
from loratools_formats.core.dtypes import SPACINGS, Array, Spacing, round_into, rounded_to_odd
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError

_BLOCK_ELEMENTS = 1 << 19
_MIN_SINGLE_ELEMENTS = 1 << 18
_MAX_SINGLE_RANK = 128
_SINGLE_ROUNDING = 2.0**-24
_OF_16_BITS = ("BF16", "F16")
_QUANTISED = Spacing(2.0**-7, math.inf)  # of Q8_0: 1/127 of a block's largest, zeros too
# Usual error of a product over the distance of stored neighbours. Above this, more entries than the
# numbers above say would take the other neighbour.
_MAX_USUAL_ERROR = 2.0**-14
_RMS_STRIDE = 61


BUFFERS = Buffers()


@dataclass(frozen=True)
class Block:
    """Consecutive elements of a tensor; the arrays are used again for the thread's next block.

    Attributes:
        start: index of the first element in the flat tensor.
        base: (rows, columns) the old values.
        total: (rows, columns) the new ones, not yet rounded to their type.
    """

    start: int
    base: Array
    total: Array


@dataclass(frozen=True)
class Patch:
    """Rows of a tensor that are replaced before anything is added: their numbers and values."""

    rows: tuple[int, ...]
    values: TensorRef


def single_precision(
    view: View, terms: Sequence[Sequence[Term | RowsTerm]], code: str, *, base_code: str
) -> Spacing | None:
    """Return the spacing of the type to store if float32 is enough to compute it, else None.

    It is enough from a type of 16 bits to the same, with no DoRA and no very high rank. Small
    tensors take no time in float64 either.
    """
    is_enough = code == base_code and code in _OF_16_BITS and _is_large_product(view, terms)
    return SPACINGS[code] if is_enough else None


def single_for_quantised(view: View, terms: Sequence[Sequence[Term | RowsTerm]]) -> Spacing | None:
    """Return the least spacing of quantised values if float32 is enough to compute them."""
    return _QUANTISED if _is_large_product(view, terms) else None


def _is_large_product(view: View, terms: Sequence[Sequence[Term | RowsTerm]]) -> bool:
    return view.planes * view.rows * view.columns >= _MIN_SINGLE_ELEMENTS and all(
        isinstance(term, Term) and term.is_product and term.right.shape[0] <= _MAX_SINGLE_RANK
        for plane in terms
        for term in plane
    )


def fused_blocks(
    tensor: TensorRef,
    view: View,
    terms: Sequence[Sequence[Term | RowsTerm]],
    patches: Sequence[Patch],
    *,
    single: Spacing | None,
    device: Device,
    step: int = 1,
) -> Iterator[Block]:
    """Yield all of a tensor with its changes added, in order.

    Args:
        tensor: the old values, in any floating type.
        view: how its elements form matrices.
        terms: what is added, for each plane.
        patches: rows to replace first.
        single: compute in float32, for a type of this spacing; None computes in float64.
        device: where products are computed.
        step: number of which the rows of each block are a multiple, but for a matrix' last block.

    Raises:
        AdapterError: a DoRA's direction has a zero row.
    """
    dtype = np.float64 if single is None else np.float32
    height = max(step, _BLOCK_ELEMENTS // max(view.columns, 1) // step * step)
    height = max(1, min(view.rows, height))
    shape = (height, view.columns)
    base, total, product = (BUFFERS.array(n, shape, dtype) for n in ("base", "total", "product"))
    masks = BUFFERS.array("masks", (2, *shape), np.bool_)
    replaced = [(np.array(patch.rows), patch.values.load(dtype)) for patch in patches]
    reader = _Reader(tensor, view, replaced)
    for plane in range(view.planes):
        prepared = [_prepared(term, dtype, device, reader) for term in terms[plane]]
        for top in range(0, view.rows, height):
            count = min(height, view.rows - top)
            w, sums = base[:count], total[:count]
            reader.read(plane, top, w)
            only = prepared[0] if len(prepared) == 1 else None
            if isinstance(only, _Product) and only.is_whole(top, count, view):
                only.put(w, sums, top)
            else:
                sums[...] = w
                for term in prepared:
                    term.add(w, sums, product[:count], top)
            if single is not None:
                products = [item for item in prepared if isinstance(item, _Product)]
                _repair(w, sums, top, products, single, masks[:, :count])
            yield Block((plane * view.rows + top) * view.columns, w, sums)


class _Reader:
    """Old values of a tensor by rows, patched."""

    def __init__(
        self, tensor: TensorRef, view: View, patches: Sequence[tuple[Array, Array]]
    ) -> None:
        self.tensor, self.view, self.patches = tensor, view, patches

    def read(self, plane: int, top: int, out: Array) -> None:
        start = (plane * self.view.rows + top) * self.view.columns
        values = BUFFERS.array("stored", (out.size,), self.tensor.dtype.numpy_dtype())
        self.tensor.elements_into(start, values)
        round_into(values, out.reshape(-1))
        for rows, replaced in self.patches:
            inside = (rows >= top) & (rows < top + len(out))
            if inside.any():
                new = replaced[inside]
                out[rows[inside] - top] = new.reshape(len(new), -1)

    def blocks(self, plane: int) -> Iterator[tuple[int, Array]]:
        height = max(1, _BLOCK_ELEMENTS // max(self.view.columns, 1))
        for top in range(0, self.view.rows, height):
            block = np.empty((min(height, self.view.rows - top), self.view.columns))
            self.read(plane, top, block)
            yield top, block


def _prepared(
    term: Term | RowsTerm, dtype: Any, device: Device, reader: _Reader
) -> _Product | _ByRows:
    if isinstance(term, RowsTerm):
        return _ByRows(term)
    if term.dora is None:
        return _Product(term, dtype, device)
    return _WithDora(term, term.dora, dtype, device, reader)


class _Product:
    """A term ready to be added to blocks."""

    def __init__(self, term: Term, dtype: Any, device: Device) -> None:
        self.term = term
        self.device = device if device.has_float64 or dtype == np.float32 else Device("cpu")
        self.columns = slice(*term.columns)
        self.dtype = dtype
        self.right = self.device.put(np.ascontiguousarray(term.right, dtype))
        self.bound = self.usual_error = 0.0
        self.right_lines = term.right.T
        if dtype == np.float32:
            self.right_lines = np.ascontiguousarray(term.right.T)  # for scattered columns
            # In float64: squares of 10^±23, which may meet in one product, leave float32.
            rows, columns = (
                np.einsum(axes, side, side, dtype=np.float64)
                for axes, side in (("ij,ij->i", term.left), ("ij,ij->j", term.right))
            )
            # Rounding errors of a product of r terms grow like √r unless they conspire
            # (Higham and Mary 2019, doi 10.1137/18M1226312). What they usually are, measured
            # against √r times the size of a sum of independent terms, does not depend on r.
            rounding = _SINGLE_ROUNDING * abs(term.weight)
            rank = term.right.shape[0]
            roundings = (math.sqrt(rank) + 2) * rounding
            self.bound = roundings * math.sqrt(rows.max()) * math.sqrt(columns.max())
            energies = (
                np.einsum(axes, side, side, dtype=np.float64)
                for axes, side in (("ij,ij->j", term.left), ("ij,ij->i", term.right))
            )
            mean_square = np.dot(*energies) / (len(rows) * len(columns))
            self.usual_error = rounding * math.sqrt(rank * mean_square)

    def is_whole(self, top: int, count: int, view: View) -> bool:
        """Return whether it covers a block with a sum without weights."""
        start, stop = self.term.rows
        covers = start <= top and top + count <= stop and self.term.columns == (0, view.columns)
        return covers and self.term.weight == 1.0 and self.term.dora is None

    def put(self, base: Array, total: Array, top: int) -> None:
        """Set the sums of a block that it covers."""
        np.add(self.multiplied(top, top + len(base), total), base, out=total)

    def multiplied(self, start: int, stop: int, out: Array) -> Array:
        """Return the rows [start, stop) of left @ right, counted in the tensor."""
        left = self.term.left[start - self.term.rows[0] : stop - self.term.rows[0]]
        left = left.astype(self.dtype, copy=False)
        if self.device.name != "cpu":
            return to_numpy(self.device.put(left) @ self.right)
        return np.matmul(left, self.right, out=out)

    def add(self, base: Array, total: Array, spare: Array, top: int) -> None:
        """Add to the sums of a block."""
        for w, sums, start, stop in self.cut(base, total, top):
            out = spare.reshape(-1)[: w.size].reshape(w.shape)
            product = self.multiplied(start, stop, out)
            self.add_product(product, w, sums, start)

    def cut(self, base: Array, total: Array, top: int) -> Iterator[tuple[Array, Array, int, int]]:
        """Yield the part of a block's arrays that lies in the rectangle, with its rows, if any."""
        start, stop = max(self.term.rows[0], top), min(self.term.rows[1], top + len(base))
        if start < stop:
            where = slice(start - top, stop - top), self.columns
            yield base[where], total[where], start, stop

    def add_product(self, product: Array, base: Array, total: Array, start: int) -> None:
        """Add what a product of factors stands for."""
        del base, start
        total += product if self.term.weight == 1.0 else self.term.weight * product


class _WithDora(_Product):
    """A DoRA: weight · (m/‖V‖ · V − W), V = W + left @ right."""

    def __init__(
        self, term: Term, dora: DoraTerm, dtype: Any, device: Device, reader: _Reader
    ) -> None:
        super().__init__(term, dtype, device)
        self.dora = dora
        self.norms = self._column_norms(reader) if dora.along_columns else None

    def _column_norms(self, reader: _Reader) -> Array:
        squares = np.zeros(self.term.columns[1] - self.term.columns[0])
        for top, block in reader.blocks(self.term.plane):
            for w, _, start, stop in self.cut(block, block, top):
                v = w + self.multiplied(start, stop, np.empty(w.shape, self.dtype))
                squares += np.einsum("ij,ij->j", v, v)
        return np.sqrt(squares)

    def add_product(self, product: Array, base: Array, total: Array, start: int) -> None:
        """Add weight · (m/‖V‖ · V − W)."""
        v = base + product
        if self.norms is not None:
            factor = _ratio(self.dora.magnitude, self.norms, self.term.module)[None, :]
        else:
            begin = start - self.term.rows[0]
            norms = np.sqrt(np.einsum("ij,ij->i", v, v))
            magnitude = self.dora.magnitude[begin : begin + len(v)]
            factor = _ratio(magnitude, norms, self.term.module)[:, None]
        total += self.term.weight * (factor * v - base)


class _ByRows:
    """A term that is known by rows."""

    def __init__(self, term: RowsTerm) -> None:
        self.term = term
        self.columns = slice(*term.columns)

    def add(self, base: Array, total: Array, spare: Array, top: int) -> None:
        """Add to the sums of a block."""
        del base, spare
        first = self.term.rows[0]
        start, stop = max(first, top), min(self.term.rows[1], top + len(total))
        if start < stop:
            rows = self.term.values.rows(start - first, stop - first)
            total[start - top : stop - top, self.columns] += self.term.weight * rows


def _ratio(magnitude: Array, norms: Array, module: str) -> Array:
    if not norms.all():
        raise AdapterError(
            "a row of W + ΔW is zero, so that the DoRA has no direction there", tensor=module
        )
    ratio: Array = magnitude / norms
    return ratio


def _repair(
    base: Array,
    total: Array,
    top: int,
    prepared: Sequence[_Product],
    spacing: Spacing,
    masks: Array,
) -> None:
    """Compute again in float64 the entries whose float32 error could show in the type to store."""
    bound = sum(term.bound for term in prepared)
    flat = total.reshape(-1)
    sample = flat[::_RMS_STRIDE]
    size = math.sqrt(float(np.dot(sample, sample)) / sample.size)
    usual_error = sum(term.usual_error for term in prepared)
    if not usual_error <= _MAX_USUAL_ERROR * spacing.relative * size:  # or one of them is NaN
        _compute_in_double(base, total, top, prepared)
        return
    if bound < spacing.smallest / 2:
        return
    # Below this, half the spacing is less than the bound: it is relative / 4 just below a power.
    limit = np.float32(4 * bound / spacing.relative)
    mask = np.less(total, limit, out=masks[0])
    mask &= np.greater(total, -limit, out=masks[1])
    places = _true_places(mask.reshape(-1))
    if len(places) > flat.size >> 6:
        _compute_in_double(base, total, top, prepared)
        return
    if not len(places):
        return
    rows, columns = np.divmod(places, total.shape[1])
    exact = base.reshape(-1)[places].astype(np.float64)
    for item in prepared:
        term = item.term
        i, j = rows + top - term.rows[0], columns - term.columns[0]
        (inside,) = (
            (i >= 0) & (i < len(term.left)) & (j >= 0) & (j < term.right.shape[1])
        ).nonzero()
        left = term.left[i[inside]].astype(np.float64)
        products = np.vecdot(left, item.right_lines[j[inside]])
        exact[inside] += term.weight * products
    flat[places] = rounded_to_odd(exact)


def _true_places(mask: Array) -> Array:
    """Return where a long mask with few true elements is true; eight elements at a glance."""
    whole = len(mask) - len(mask) % 8
    words = np.flatnonzero(mask[:whole].view(np.uint64) != 0)
    eights, offsets = np.divmod(np.flatnonzero(mask[:whole].reshape(-1, 8)[words]), 8)
    rest = whole + np.flatnonzero(mask[whole:])
    return np.concatenate([words[eights] * 8 + offsets, rest])


def _compute_in_double(base: Array, total: Array, top: int, prepared: Sequence[_Product]) -> None:
    exact = base.astype(np.float64)
    for item in prepared:
        term = item.term
        for _, sums, start, stop in item.cut(base, exact, top):
            left = term.left[start - term.rows[0] : stop - term.rows[0]].astype(np.float64)
            np.add(sums, term.weight * (left @ term.right), out=sums)
    total[...] = rounded_to_odd(exact)
