"""RandLoRA: a full-rank sum of random products, scaled by trained diagonals (arXiv 2502.00987).

ΔW = scale · Σ B diag(λ) A diag(γ) over n summands, or its transpose: A (r, 1, smaller side) and γ
lie on the smaller side of the weight, B (larger side, n, r) on the other. The scale is α/r in PEFT
and α/(r√n) in the authors' code, so the reader must know which it has. Bases that are not stored
are drawn again from the seed, normalised by the standard deviation of the whole tensor. Source:
`RandLoraModel` and `RandLoraLayer` in peft 0.21.2.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools.kinds.numbers.random_stream import TorchStream
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import DTYPES, Array, DType, encode


def _bases(tensors: Tensors, delta: KindDelta, rank: int) -> tuple[Array, Array]:
    """Return A (r, smaller side) and B (larger side, n, r), of the largest module."""
    if "a" in tensors and "b" in tensors:
        return tensors["a"].reshape(rank, -1), tensors["b"]
    smaller, larger = sorted(delta.settings["largest"])
    count = -(-smaller // rank)
    stream = TorchStream(delta.settings["seed"])
    sparsity = delta.settings["sparsity"]
    if sparsity == "root":
        sparsity = math.sqrt(smaller)
    if sparsity is not None:
        a = _ternary(stream.uniform((rank, smaller), 0.0, 1.0), sparsity)
        b = _ternary(stream.uniform((larger, count, rank), 0.0, 1.0), sparsity)
        return a / a.std(ddof=1), b / b.std(ddof=1)
    dtype = DTYPES[delta.settings["draws"].upper()]
    a = _uniform(stream, (rank, smaller), smaller, dtype)
    drawn = [_uniform(stream, (larger, rank), rank, dtype) for _ in range(count)]
    return _normalised(a, dtype), _normalised(np.stack(drawn, axis=1), dtype)


def _uniform(stream: TorchStream, shape: tuple[int, int], fan: int, dtype: DType) -> Array:
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / 6.0) / math.sqrt(fan))
    return stream.uniform_narrow(shape, -bound, bound, dtype).astype(np.float64)


def _normalised(values: Array, dtype: DType) -> Array:
    """Divide by the standard deviation in the arithmetic of a narrow type."""
    deviation = encode(np.array(values.std(ddof=1)), dtype).astype(np.float64)
    return encode(values / deviation, dtype).astype(np.float64)


def _ternary(unit: Array, sparsity: float) -> Array:
    share = np.float32(1.0 / (2.0 * sparsity))
    return np.where(unit < share, -1.0, np.where(unit > np.float32(1.0) - share, 1.0, 0.0))


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    lambdas, gammas = tensors["lambda"], tensors["gamma"]
    rank, count = lambdas.shape
    smaller, larger = sorted(weight.shape)
    a, b = _bases(tensors, delta, rank)
    if gammas.shape != (count, smaller):
        raise tensors.wrong_shape("gamma", f"({count}, {smaller})")
    if a.shape[1] < smaller or b.shape[0] < larger or b.shape[1] < count or b.shape[2] != rank:
        raise tensors.wrong_shape("lambda", f"bases for a weight of {larger} by {smaller}")
    # A's products run over directions first and B's over summands first, so direction k of summand
    # j meets number k·n + j counted the other way; that is how such adapters are trained.
    on_smaller = (a[:, None, :smaller] * lambdas[:, :, None] * gammas[None]).reshape(-1, smaller)
    on_larger = b[:larger, :count].reshape(larger, -1)
    scale = delta.settings["scale"]
    if delta.settings["rule"] == "authors":
        scale /= math.sqrt(count)
    left, right = (
        (on_larger, on_smaller)
        if weight.shape[1] == smaller
        else (
            on_smaller.T,
            on_larger.T,
        )
    )
    return Rows(weight.shape, lambda start, stop: scale * (left[start:stop] @ right))


KIND = Kind(
    name="randlora",
    title="RandLoRA",
    source="arXiv 2502.00987",
    parts=("lambda", "gamma"),
    optional=("a", "b"),
    needs="shape",
    low_rank=False,
    form=_form,
)
