"""Merging full differences: weighted sums of whole matrices, rounded once to what they stand in.

A module that one adapter changes by a full difference has no factors in the result, whatever the
other adapters have of it. Signs, drops and spectra of these matrices are another method than that
of low-rank changes, so that a method which is no weighted sum takes them only on request, as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loratools.algebra.row_blocks import row_spans
from loratools.base.shape_only import ShapeOnly
from loratools.folding.decomposed import rows_of
from loratools.folding.module import checked_form, known_shape
from loratools.kinds.declaration import Product, Rows
from loratools.lowrank.resize import rounded
from loratools.operations.merge.align import AlignedModule, MergeInput
from loratools.operations.merge.module import pairs_of
from loratools.work.scratch import Scratch
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import KindDelta, ModuleChange
from loratools_formats.core.dtypes import Array, common_dtype
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, UnsupportedError

Coefficients = Callable[[str, Array], Array]


@dataclass(frozen=True)
class MergedWhole:
    """The merged difference of a module.

    Attributes:
        name: module path.
        change: what to write; None if every adapter that has the module has the weight 0 there.
        squared_norm: ‖ΔW‖²_F.
        squared_error: of the stored, rounded values.
        ranks_in: rank of each adapter's factors, None where it has none.
        absent: names of the adapters that do not have the module.
    """

    name: str
    change: ModuleChange | None
    squared_norm: float
    squared_error: float
    ranks_in: tuple[int | None, ...]
    absent: tuple[str, ...]


def is_whole(change: ModuleChange) -> bool:
    """Return whether a change is a full difference of a matrix."""
    of_matrix = change.layer.kind in ("linear", "conv")
    return change.kind == "full" and not change.is_dora and of_matrix


def whole_modules(inputs: Sequence[MergeInput]) -> tuple[list[MergeInput], list[AlignedModule]]:
    """Return the adapters without the modules that one changes by a full difference, and those."""
    names = {n for item in inputs for n, change in item.adapter.modules.items() if is_whole(change)}
    modules = []
    for name in sorted(names):
        deltas = tuple(item.adapter.modules.get(name) for item in inputs)
        pairs = zip(deltas, inputs, strict=True)
        modules.append(AlignedModule(name, deltas, tuple(i.name for d, i in pairs if d is None)))
    return [replace(item, adapter=_without(item, names)) for item in inputs], modules


def _without(item: MergeInput, names: set[str]) -> Adapter:
    modules = {n: d for n, d in item.adapter.modules.items() if n not in names}
    return replace(item.adapter, modules=modules)


def merged_whole(
    module: AlignedModule, coefficients: Coefficients, scratch: Scratch
) -> MergedWhole:
    """Return the weighted sum of a module's changes, rounded once.

    Args:
        module: of which one change is a full difference.
        coefficients: of the adapters, given the module and the (T, T) matrix of inner products.
        scratch: where the values wait until they are written.

    Raises:
        AdapterError: shapes differ, values are not finite or do not fit the type.
        UnsupportedError: another adapter's change depends on the base.
    """
    first = next(d.kind_delta for d in module.deltas if d is not None and is_whole(d))
    assert first is not None
    shape = first.parts["diff"].shape
    sources = [None if d is None else _rows(module.name, d) for d in module.deltas]
    sizes = {source.shape for source in sources if source is not None}
    if len(sizes) > 1:
        raise AdapterError(
            "a module differs between the adapters",
            tensor=module.name,
            got=" and ".join(f"out {out}, in {in_}" for out, in_ in sorted(sizes)),
        )
    (size,) = sizes
    shares = coefficients(module.name, _gram(sources, size))
    held = [share for share, source in zip(shares, sources, strict=True) if source is not None]
    ranks = tuple(None if d is None else d.rank for d in module.deltas)
    if not any(held):
        return MergedWhole(module.name, None, 0.0, 0.0, ranks, module.absent)
    dtype = common_dtype([t.dtype for d in module.deltas if d is not None for t in _values(d)])
    stored = np.empty(size, dtype.numpy_dtype())
    squared_norm = squared_error = 0.0
    for start, stop in row_spans(size):
        exact = np.zeros((stop - start, size[1]))
        for share, source in zip(shares, sources, strict=True):
            if source is not None and share:
                exact += share * source.rows(start, stop)
        stored[start:stop], back = rounded(exact, dtype, module.name)
        squared_norm += float(np.vdot(exact, exact))
        squared_error += float(np.sum((back - exact) ** 2))
    diff = scratch.store(f"{module.name}.diff", stored.reshape(shape), dtype)
    delta = replace(first, parts={"diff": diff}, settings={"scale": 1.0}, alpha_tensor=None)
    change = ModuleChange(delta)
    return MergedWhole(module.name, change, squared_norm, squared_error, ranks, module.absent)


def refuse_unasked(modules: Sequence[AlignedModule], method: str) -> None:
    """Refuse full differences in a method that is no weighted sum.

    Raises:
        UnsupportedError: there are some.
    """
    for module in modules:
        raise UnsupportedError(
            f"{method} is no weighted sum, and a module has no factors but a full difference",
            tensor=module.name,
            hint="Use `method=linear`, or pass `linear_differences=True` to add up differences "
            "by their weights",
        )


def _rows(name: str, change: ModuleChange) -> Rows:
    if change.factors is not None and not change.is_dora and change.layer.kind != "experts":
        ((b, a),) = pairs_of(change)
        return rows_of(Product(b, a))
    if is_whole(change) and change.kind_delta is not None:
        return rows_of(checked_form(name, change.kind_delta, _shape(change.kind_delta)))
    raise UnsupportedError(
        f"a full difference and a weight change of kind {change.kind} of one module are not merged",
        tensor=name,
        hint="Make each a plain LoRA first: "
        "loratools to-lora ADAPTER --base MODEL --rank 16 -o plain",
    )


def _shape(delta: KindDelta) -> ShapeOnly:
    return ShapeOnly(known_shape(delta))


def _values(change: ModuleChange) -> list[TensorRef]:
    part = change.factors
    if part is not None:
        return [part.a, part.b]
    return [] if change.kind_delta is None else [change.kind_delta.parts["diff"]]


def _gram(sources: Sequence[Rows | None], size: tuple[int, int]) -> Array:
    gram = np.zeros((len(sources), len(sources)))
    for start, stop in row_spans(size):
        block = np.stack(
            [
                np.zeros((stop - start) * size[1])
                if source is None
                else source.rows(start, stop).reshape(-1)
                for source in sources
            ]
        )
        gram += block @ block.T
    return gram
