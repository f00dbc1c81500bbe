"""Merging one module: from aligned deltas to a matrix that can be asked for factors of any rank.

Span and core methods give exact factors of the result. Elementwise methods, and everything that
involves a DoRA, whose change has full rank, give rows, which are kept in an anonymous file and
decomposed as a stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loratools.algebra import linalg
from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Matrix
from loratools.algebra.row_blocks import RowStore
from loratools.algebra.streamed_svd import StreamedMatrix, streamed_svd
from loratools.base.placement.names import Names
from loratools.base.weights import find_base_module
from loratools.folding.decomposed import rows_of
from loratools.folding.dora import Rescaling, rescaling_of
from loratools.kinds.declaration import Product, Weight
from loratools.lowrank.matrices import is_float64, loaded
from loratools.operations.merge.align import AlignedModule
from loratools.operations.merge.methods import Method
from loratools.operations.merge.space import lifted, shared_space
from loratools.operations.merge.tasks import (
    DenseRows,
    FactorRows,
    RowReader,
    TaskRows,
    Tasks,
    ZeroRows,
)
from loratools.work.seeds import seed_of_matrix
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.core.factors import NOT_FINITE
from loratools_formats.disk.errors import AdapterError, UnsupportedError

Space = Literal["full", "core"]


@dataclass(frozen=True)
class ModuleMethod:
    """A method with everything that one module needs to run it.

    Attributes:
        method: what to do.
        parameters: its parameters, checked.
        weights: (T,) of the adapters, for this module.
        space: where an elementwise method works.
        seed: of random methods and of the streamed SVD.
        power_iterations: of the streamed SVD.
        width: triplets that the streamed SVD looks for, given (out, in).
        share_threshold: see `Tasks`.
    """

    method: Method
    parameters: Mapping[str, Any]
    weights: Array
    space: Space
    seed: int
    power_iterations: int
    width: Callable[[AlignedModule], int]
    share_threshold: Callable[[int, float], float] | None = None


MergedMatrix = Matrix | StreamedMatrix
FactorPair = tuple[Array, Array]


@dataclass(frozen=True)
class MergedModule:
    """The merged change of one module, one matrix per expert.

    Attributes:
        matrices: the results.
        coefficients: of span methods, one row per expert; None for others.
        pairs: factors of scale 1 that were merged, per expert and adapter; None where streamed.
    """

    matrices: list[MergedMatrix]
    coefficients: Array | None
    pairs: list[list[FactorPair | None]] | None


def merged_module(
    module: AlignedModule,
    run: ModuleMethod,
    base: Names | None,
    scratch_folder: Path | None,
    device: Device,
    in_base: str | None = None,
) -> MergedModule:
    """Merge one module.

    Args:
        module: deltas, aligned.
        run: the method.
        base: the base model, if there is one.
        scratch_folder: where streamed rows wait.
        device: where to compute.
        in_base: what the base calls the module, if not as the adapters do.

    Raises:
        UnsupportedError: a DoRA without the base, or in a method that needs factors.
        AdapterError: NaN or infinite values, or a base weight that does not fit.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            if module.needs_base:
                merged = _through_base(module, run, base, in_base or module.name, scratch_folder)
            else:
                merged = _from_factors(module, run, scratch_folder, device)
        except np.linalg.LinAlgError:  # factors are finite, so their products are not
            _check_finite(math.inf)
            raise
        _check_finite(sum(matrix.squared_norm for matrix in merged.matrices))
    return merged


def _check_finite(squared_norm: float) -> None:
    if not math.isfinite(squared_norm):
        raise AdapterError("the merged change overflows", hint="Are scales and weights right?")


def _from_factors(
    module: AlignedModule, run: ModuleMethod, scratch_folder: Path | None, device: Device
) -> MergedModule:
    stacks = [None if d is None else pairs_of(d) for d in module.deltas]
    use_gram = not any(d is not None and is_float64(d.require_factors()) for d in module.deltas)
    matrices: list[MergedMatrix] = []
    coefficients, all_pairs = [], []
    for expert in range(module.first.experts):
        pairs = [None if stack is None else stack[expert] for stack in stacks]
        label = f"{module.name}#{expert}"
        if run.method.kind == "span":
            matrix, shares = _weighted_sum(pairs, run, device, use_gram)
            matrices.append(matrix)
            coefficients.append(shares)
            all_pairs.append(pairs)
        elif run.method.kind == "core":
            space = shared_space(pairs, module.first.shape)
            b, a = run.method.function(space, run.weights, **run.parameters)
            matrices.append(Matrix(b, a, 1.0, device, use_gram=False))
        elif run.space == "core":
            matrices.append(_elementwise_in_core(module, run, pairs, label, device))
        else:
            sources: list[TaskRows] = [
                ZeroRows(module.first.shape[1]) if pair is None else FactorRows(*pair)
                for pair in pairs
            ]
            tasks = Tasks(sources, module.first.shape, run.seed, label, run.share_threshold)
            rows = run.method.function(tasks, run.weights, **run.parameters)
            matrices.append(_streamed(tasks, rows, module, run, scratch_folder))
    if run.method.kind == "span":
        return MergedModule(matrices, np.array(coefficients), all_pairs)
    return MergedModule(matrices, None, None)


def pairs_of(delta: ModuleChange) -> list[FactorPair]:
    """Return the factors of each matrix of a delta in float64, the scale folded in.

    Raises:
        AdapterError: a factor holds NaN or infinite values.
    """
    part = delta.require_factors()
    pairs = []
    for b, a in loaded(part):
        for values, tensor in ((a, part.a), (b, part.b)):
            if not (math.isfinite(values.sum()) or np.isfinite(values).all()):
                raise AdapterError(NOT_FINITE, tensor=tensor.key)
        scaled: Array = np.multiply(b, part.scale, out=b if b.flags.writeable else None)
        pairs.append((scaled, a))
    return pairs


def _coefficients(run: ModuleMethod, gram: Array) -> Array:
    result: Array = run.method.function(gram, run.weights, **run.parameters)
    return result


def _weighted_sum(
    pairs: list[FactorPair | None], run: ModuleMethod, device: Device, use_gram: bool
) -> tuple[Matrix, Array]:
    """Return Σ cₜ·ΔWₜ and the coefficients, both from the Gram matrices of all factors at once."""
    present = [pair for pair in pairs if pair is not None]
    ranks = [0 if pair is None else len(pair[1]) for pair in pairs]
    b, a = linalg.concatenate([(1.0, *pair) for pair in present])
    # Beyond the rank that a product can have, their Gram matrices are larger than the product.
    both = linalg.grams(b, a) if len(a) <= min(len(b), a.shape[1]) else None
    gram = _inner_products(b, a, np.array(ranks), both)
    shares = _coefficients(run, (gram + gram.T) / 2.0)
    factors = np.repeat(np.asarray(shares, np.float64), ranks)
    b *= factors
    known = both and linalg.Grams(both.b * np.multiply.outer(factors, factors), both.a)
    return Matrix(b, a, 1.0, device, use_gram, known), shares


def _inner_products(b: Array, a: Array, ranks: Array, both: linalg.Grams | None) -> Array:
    """Return ⟨bᵢaᵢ, bⱼaⱼ⟩ of the parts of concatenated factors: (N, N).

    Args:
        b: (out, Σ ranks).
        a: (Σ ranks, in).
        ranks: (N,) of the parts; those of rank 0 get zeros.
        both: the Gram matrices, if they are known.
    """
    found = np.zeros((len(ranks), len(ranks)))
    present = np.flatnonzero(ranks)
    ends = np.cumsum(ranks[present])
    starts = ends - ranks[present]
    for index, start, end in zip(present, starts, ends, strict=True):
        of_b = b[:, start:end].T @ b if both is None else both.b[start:end]
        of_a = a[start:end] @ a.T if both is None else both.a[start:end]
        found[index, present] = np.add.reduceat((of_b * of_a).sum(axis=0), starts)
    return found


def _elementwise_in_core(
    module: AlignedModule,
    run: ModuleMethod,
    pairs: list[FactorPair | None],
    label: str,
    device: Device,
) -> Matrix:
    space = shared_space(pairs, module.first.shape)
    sources = [DenseRows(core) for core in space.cores]
    tasks = Tasks(sources, (space.u.shape[1], space.v.shape[1]), run.seed, label)
    rows = run.method.function(tasks, run.weights, **run.parameters)
    core = np.concatenate([*tasks.each(rows)])
    return Matrix(*lifted(space, core), 1.0, device, use_gram=False)


def _streamed(
    tasks: Tasks, rows: RowReader, module: AlignedModule, run: ModuleMethod, folder: Path | None
) -> StreamedMatrix:
    store = RowStore(tasks.shape, folder)
    for block in tasks.each(lambda start, stop: _rounded(rows(start, stop))):
        store.append(*block)
    _check_finite(store.squared_norm)
    seed = seed_of_matrix(run.seed, tasks.name)
    svd = streamed_svd(store, run.width(module), power_iterations=run.power_iterations, seed=seed)
    return StreamedMatrix(store, lambda: svd)


def _rounded(rows: Array) -> tuple[Array, float]:
    """Return rows in float32, and ‖·‖²_F of those."""
    stored = np.ascontiguousarray(rows, dtype=np.float32)
    return stored, float(np.sum(stored.astype(np.float64) ** 2))


@dataclass(frozen=True)
class _DoraRows:
    """Rows of a DoRA's change."""

    rescaling: Rescaling

    def rows(self, start: int, stop: int) -> Array:
        """Return rows [start, stop)."""
        return self.rescaling.rows(start, stop).astype(np.float32)


def _through_base(
    module: AlignedModule,
    run: ModuleMethod,
    base: Names | None,
    in_base: str,
    folder: Path | None,
) -> MergedModule:
    if base is None:
        raise UnsupportedError(
            "a DoRA's weight change depends on the base weight",
            tensor=module.name,
            hint="Pass the base model as `base`",
        )
    if run.method.kind == "core" or run.space == "core":
        raise UnsupportedError(
            f"{run.method.name} works on low-rank factors, and a DoRA's change has full rank",
            tensor=module.name,
            hint="Use another method",
        )
    weight = find_base_module(base, in_base, module.first, only_read=True).weight()
    sources = [_row_source(delta, weight, module) for delta in module.deltas]
    tasks = Tasks(sources, module.first.shape, run.seed, f"{module.name}#0", run.share_threshold)
    coefficients = None
    if run.method.kind == "elementwise":
        rows: RowReader = run.method.function(tasks, run.weights, **run.parameters)
    else:
        gram = np.zeros((tasks.count, tasks.count))

        def products(start: int, stop: int) -> Array:
            block = tasks.block(start, stop).astype(np.float64).reshape(tasks.count, -1)
            return block @ block.T

        for part in tasks.each(products):
            gram += part
        shares = _coefficients(run, gram)
        coefficients = shares[None, :]

        def rows(start: int, stop: int) -> Array:
            block = tasks.block(start, stop).astype(np.float64)
            result: Array = np.tensordot(shares, block, axes=1)
            return result

    return MergedModule([_streamed(tasks, rows, module, run, folder)], coefficients, None)


def _row_source(delta: ModuleChange | None, weight: Weight, module: AlignedModule) -> TaskRows:
    if delta is None:
        return ZeroRows(module.first.shape[1])
    ((b, a),) = pairs_of(delta)
    if delta.magnitude is None:
        return FactorRows(b, a)
    change = rows_of(Product(b, a))
    return _DoraRows(rescaling_of(delta.magnitude, delta.axis, weight, change))
