"""VeRA: random projections that all modules share, scaled by trained vectors (arXiv 2310.11454).

ΔW = diag(λ_b) B[:out] @ diag(λ_d) A[:, :in]. Where the file does not hold A (r, largest in) and B
(largest out, r), they are drawn again from the seed in its configuration: He-uniform numbers of a
Mersenne Twister. In PVeRA the first half of λ_d and A are the means, which is what PEFT merges.
Source: `VeraModel` and `PVeraModel` in peft 0.21.2.
"""

from __future__ import annotations

import math

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Product, Tensors, Weight
from loratools.kinds.numbers.random_stream import TorchStream
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


def _projections(
    tensors: Tensors, delta: KindDelta, weight: Weight, rank: int, rank_a: int
) -> tuple[Array, Array]:
    out, in_ = weight.shape
    if "a" in tensors and "b" in tensors:
        a, b = tensors["a"], tensors["b"]
    else:
        largest_out, largest_in = delta.settings["largest"]
        stream = TorchStream(delta.settings["seed"])
        a = _he_uniform(stream, (rank_a, largest_in))
        b = _he_uniform(stream, (largest_out, rank))
    if a.shape[0] != rank_a or a.shape[1] < in_ or b.shape[0] < out or b.shape[1] != rank:
        raise AdapterError(
            "the shared projections do not fit the module",
            got=f"A {list(a.shape)}, B {list(b.shape)}",
            expected=f"({rank_a}, {in_} or more) and ({out} or more, {rank})",
        )
    return a[:, :in_], b[:out]


def _he_uniform(stream: TorchStream, shape: tuple[int, int]) -> Array:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return stream.uniform(shape, -bound, bound).astype(np.float64)


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors = Tensors(delta)
    lambda_b, lambda_d = tensors["lambda_b"], tensors["lambda_d"]
    rank_a = len(lambda_d)
    rank = rank_a // 2 if delta.settings["halves"] else rank_a
    a, b = _projections(tensors, delta, weight, rank, rank_a)
    return Product(lambda_b[:, None] * b[:, :rank], lambda_d[:rank, None] * a[:rank])


KIND = Kind(
    name="vera",
    title="VeRA",
    source="arXiv 2310.11454",
    parts=("lambda_b", "lambda_d"),
    optional=("a", "b"),
    needs="shape",
    form=_form,
)
