"""Parts of a weighted sum of factors that need no SVD: exact joins, biases, the FedEx residual."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools.lowrank.planned import PlannedFactors
from loratools.operations.merge.align import AlignedModule
from loratools.operations.merge.module import MergedModule
from loratools_formats.core.change import LowRank
from loratools_formats.core.dtypes import Array, DType, common_dtype, encode, is_power_of_two
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import AdapterError, UnsupportedError


def merged_bias(module: AlignedModule, merged: MergedModule) -> TensorRef | None:
    """Return Σ cₜ·scaleₜ·biasₜ of the factors' biases.

    Raises:
        UnsupportedError: the method is no weighted sum.
        AdapterError: NaN or infinite values.
    """
    parts = [None if delta is None else delta.require_factors() for delta in module.deltas]
    with_bias = [part.bias for part in parts if part is not None and part.bias is not None]
    if not with_bias:
        return None
    if merged.coefficients is None:
        raise UnsupportedError(
            "biases of factors (lora_bias) can only be merged by a weighted sum",
            tensor=module.name,
            hint="Use `method=linear`",
        )
    total = np.zeros(with_bias[0].shape)
    for share, part in zip(merged.coefficients[0], parts, strict=True):
        if part is not None and part.bias is not None:
            total += share * part.scale * part.bias.load(np.float64)
    if not np.isfinite(total).all():
        raise AdapterError("bias of factors holds NaN or infinite values", tensor=with_bias[0].key)
    return in_memory(with_bias[0].key, total, common_dtype([bias.dtype for bias in with_bias]).code)


def _scaled_parts(module: AlignedModule, merged: MergedModule) -> list[tuple[float, LowRank]]:
    """Return the summed factors, each with its number; none if experts have different numbers."""
    shares = merged.coefficients
    if shares is None or merged.pairs is None or (shares != shares[0]).any():
        return []
    parts = [None if delta is None else delta.require_factors() for delta in module.deltas]
    return [
        (float(share) * part.scale, part)
        for share, part in zip(shares[0], parts, strict=True)
        if part is not None and share != 0.0
    ]


def joined_form(module: AlignedModule, merged: MergedModule) -> tuple[int, float] | None:
    """Return the rank and the scale that `joined_exactly` gives, if it gives any; reads no values.

    None if there is nothing that could be joined.
    """
    pairs = _scaled_parts(module, merged)
    return (sum(part.rank for _, part in pairs), abs(pairs[0][0])) if pairs else None


def joined_exactly(
    module: AlignedModule, merged: MergedModule, planned: PlannedFactors
) -> LowRank | None:
    """Return the concatenated factors if no value needs rounding, None if one does.

    One scale stands for all, a positive one; factors take up signs and ratios, exact if these are
    powers of two.
    """
    pairs = _scaled_parts(module, merged)
    if not pairs:
        return None
    scale = abs(pairs[0][0])
    if scale == 0.0:
        return None
    ratios = [factor / scale for factor, _ in pairs]
    if ratios == [1.0]:
        return replace(pairs[0][1], scale=scale)
    dtypes = {tensor.dtype for _, part in pairs for tensor in (part.a, part.b)}
    powers_of_two = all(map(is_power_of_two, ratios))
    if planned.bias is not None or len(dtypes) > 1 or not powers_of_two:
        return None
    factors = [(ratio, part.b) for ratio, (_, part) in zip(ratios, pairs, strict=True)]
    dtype = next(iter(dtypes))
    if any(ratio != 1.0 for ratio in ratios):
        b = _concatenated(factors, -1)
        if not np.array_equal(encode(b, dtype).astype(np.float64), b):
            return None
    rank = sum(part.rank for _, part in pairs)
    new = planned.resized(rank, dtype, dtype, scale)
    a = _joined(new.a.key, dtype, new.a.shape, [(1.0, part.a) for _, part in pairs], -2)
    return new.made(a, _joined(new.b.key, dtype, new.b.shape, factors, -1), scale, None)


def _concatenated(parts: list[tuple[float, TensorRef]], axis: int) -> Array:
    """Return the tensors beside each other, each times its number; as stored if none changes."""
    if all(ratio == 1.0 for ratio, _ in parts):
        return np.concatenate([tensor.load() for _, tensor in parts], axis=axis)
    return np.concatenate([ratio * tensor.load(np.float64) for ratio, tensor in parts], axis=axis)


def _joined(
    key: str,
    dtype: DType,
    shape: tuple[int, ...],
    parts: list[tuple[float, TensorRef]],
    axis: int,
) -> TensorRef:
    """Return a reference that joins tensors when it is read, so that none is held until then."""
    return TensorRef(key, dtype, shape, lambda: encode(_concatenated(parts, axis), dtype).tobytes())


def factor_residual(merged: MergedModule, module: AlignedModule) -> float | None:
    """Return ‖Σ cₜΔWₜ − B̄Ā‖²_F, what averaging the factors themselves would get wrong."""
    if merged.pairs is None or merged.coefficients is None:
        return None
    total = 0.0
    for shares, pairs, matrix in zip(
        merged.coefficients, merged.pairs, merged.matrices, strict=True
    ):
        present = [
            (float(share), delta.require_factors(), pair)
            for share, delta, pair in zip(shares, module.deltas, pairs, strict=True)
            if pair is not None and delta is not None
        ]
        same = {(part.rank, part.scale) for _, part, _ in present}
        if len(same) > 1 or len(present) < len(pairs):
            return None
        mean_b = sum(share * pair[0] for share, _, pair in present)
        mean_a = sum(share * pair[1] for share, _, pair in present)
        total += matrix.squared_error(np.asarray(mean_b), np.asarray(mean_a))
    return total
