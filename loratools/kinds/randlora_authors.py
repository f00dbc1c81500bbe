"""RandLoRA as its authors' experiments without PEFT have it: GPT-2, and vision (arXiv 2502.00987).

With bases A (n or 1, r, ·) and B (n, ·, r), of which a module takes what fits it, and trained λ
(n, r) and γ (n, smaller side), P = Σ B_j diag(λ) A diag(γ) as PEFT's RandLoRA counts it, has the
longer side of the weight first. Of GPT-2, whose weights are (in, out), the elements of P in their
order are those of the weight's change, also where its sides are the other way round; a fused layer
has λ and γ, and rows of B, for each projection that is adapted. In vision P is turned to fit. The
scale is α/(r√n) for GPT-2 and α/r for vision. Source: `NLG/loralib/randlora_layers.py` and
`vision_language/src/rand_lora.py` of PaulAlbert31/RandLoRA 4ac565e.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from loratools.kinds.declaration import DeltaForm, Kind, Rows, Tensors, Weight
from loratools_formats.core.change import KindDelta
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import AdapterError


def _form(delta: KindDelta, weight: Weight) -> DeltaForm:
    tensors, settings = Tensors(delta), delta.settings
    bases = tensors["a"], tensors["b"]
    lambdas, gammas = tensors["lambda"], tensors["gamma"]
    rank, count = bases[1].shape[2], len(lambdas)
    if bases[0].shape[1] != rank or len(bases[0]) not in (1, len(bases[1])):
        raise tensors.wrong_shape("a", f"(1 or {len(bases[1])}, {rank}, …), as B is")
    if len(bases[1]) < count or lambdas.shape[1] % rank:
        raise tensors.wrong_shape("lambda", f"(at most {len(bases[1])}, a multiple of {rank})")
    scale = settings["alpha"] / rank
    if not settings["vision"]:
        scale /= math.sqrt(count)
    if settings.get("groups") is not None:
        return _fused(tensors, bases, settings["groups"], scale)
    smaller, larger = sorted(weight.shape)
    if gammas.shape != (count, smaller):
        raise tensors.wrong_shape("gamma", f"({count}, {smaller})")
    left, right = _factors(tensors, bases, (lambdas, gammas), slice(0, larger))
    out, in_ = weight.shape
    if settings["vision"] or out <= in_:
        # The product, or its transpose; that of GPT-2 has the inputs first.
        straight = settings["vision"] and out >= in_
        left, right = (left, right) if straight else (right.T, left.T)
        return Rows((out, in_), lambda start, stop: scale * (left[start:stop] @ right))
    whole = (left @ right).reshape(in_, out)
    return Rows((out, in_), lambda start, stop: scale * whole[:, start:stop].T)


def _factors(
    tensors: Tensors, bases: tuple[Array, Array], trained: tuple[Array, Array], rows: slice
) -> tuple[Array, Array]:
    """Return P as factors: some rows of B (·, n·r), and A with both diagonals (r·n, ·)."""
    (lambdas, gammas), (a, b) = trained, bases
    count, width = gammas.shape
    a, b = a[:count, :, :width], b[:count, rows]
    if a.shape[2] != width or b.shape[1] != rows.stop - rows.start:
        raise tensors.wrong_shape("b", f"bases for {rows.stop} by {width}")
    spread = lambdas[:, :, None] * a * gammas[:, None, :]
    # Summands run first on one side and last on the other; so these adapters are trained.
    right = spread.transpose(1, 0, 2).reshape(-1, width)
    return b.transpose(1, 0, 2).reshape(b.shape[1], -1), right


def _fused(tensors: Tensors, bases: tuple[Array, Array], groups: str, scale: float) -> Rows:
    lambdas, gammas = tensors["lambda"], tensors["gamma"]
    rank, enabled = bases[1].shape[2], groups.count("1")
    if lambdas.shape[1] != enabled * rank or gammas.shape[1] % enabled:
        raise AdapterError(
            "the groups given do not fit the tensors",
            got=f"{enabled} enabled of {len(groups)}",
            expected=f"{lambdas.shape[1] // rank} enabled",
        )
    height = gammas.shape[1] // enabled  # also the number of inputs, or γ would fit no A
    blocks: list[tuple[Array, Array] | None] = []
    for digit in groups:
        i = sum(block is not None for block in blocks)
        own = lambdas[:, i * rank :][:, :rank], gammas[:, i * height :][:, :height]
        rows = slice(i * height, (i + 1) * height)
        blocks.append(_factors(tensors, bases, own, rows) if digit == "1" else None)

    def rows_of(start: int, stop: int) -> Array:
        parts = []
        for place, block in enumerate(blocks):
            first, last = (min(max(row - place * height, 0), height) for row in (start, stop))
            if first < last:
                zero = np.zeros((last - first, height))
                parts.append(zero if block is None else scale * (block[0][first:last] @ block[1]))
        return np.concatenate(parts)

    return Rows((height * len(groups), height), rows_of)


def _completed(delta: KindDelta) -> KindDelta:
    groups = delta.settings.get("groups")
    if groups is None:
        return delta
    height = delta.parts["gamma"].shape[1] // groups.count("1")
    return replace(delta, shape=(height * len(groups), height))


KIND = Kind(
    name="randlora_authors",
    title="RandLoRA of its authors (GPT-2, vision)",
    source="arXiv 2502.00987",
    parts=("lambda", "gamma", "a", "b"),
    needs="shape",
    low_rank=False,
    form=_form,
    completed=_completed,
)
