"""Which way round a delta lies in the weight it belongs to.

A file's factors say (out, in); the base weight may be stored the other way round: transformers'
Conv1D, embeddings, and expert parameters of some models and PEFT versions. PEFT's
`fan_in_fan_out` is one flag for all modules and can be false for some, so shapes decide, and
only a square weight falls back on what the reader found out.
"""

from __future__ import annotations

import math
from dataclasses import replace

from loratools_formats.core.change import KindDelta, LowRank
from loratools_formats.disk.errors import AdapterError, UnsupportedError

OTHER_BASE = "Is this the model the adapter was trained on?"
"""The hint where an adapter does not fit a base."""

_CONV1D_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def named_conv1d(key: str) -> bool:
    """Return whether a weight or module is named as transformers' Conv1D layers are.

    OpenCLIP's linear layers have their names, too, and lie in its `resblocks`.
    """
    module = key.removesuffix(".weight")
    return module.rpartition(".")[2] in _CONV1D_LEAVES and ".resblocks." not in module


def is_transposed(name: str, delta: LowRank | KindDelta, weight_shape: tuple[int, ...]) -> bool:
    """Return whether the weight is stored as (in, out).

    Args:
        name: the module, for messages.
        delta: its factors, or a change of another kind, which may leave one side open.
        weight_shape: shape of the base weight, as stored.

    Raises:
        AdapterError: the factors fit the weight neither way.
        UnsupportedError: the weight is square and nothing tells which way is meant.
    """
    out, in_ = delta.shape
    kind = delta.layer.kind
    stack: tuple[int, ...] = ()
    if kind == "experts":
        stack, matrix = tuple(weight_shape[:-2]), tuple(weight_shape[-2:])
    elif kind == "conv":
        matrix = (weight_shape[0], math.prod(weight_shape[1:]))
    elif delta.layer.parameters and len(weight_shape) == 3 and weight_shape[0] == 1:
        matrix = tuple(weight_shape[1:])  # a stack of one expert
    elif kind == "linear" and not delta.layer.parameters and len(weight_shape) > 2:
        # A flattened convolution looks like a linear layer in the file, and one of 1×1 is one.
        matrix, kind = (weight_shape[0], math.prod(weight_shape[1:])), "conv"
    else:
        matrix = tuple(weight_shape)
    expected_stack = (delta.experts,) if kind == "experts" else ()
    straight = _fits(matrix, (out, in_)) and kind != "embedding"
    transposed = _fits(matrix, (in_, out)) and kind != "conv"
    if stack != expected_stack or not (straight or transposed):
        raise AdapterError(
            "the delta does not fit the base weight",
            tensor=name,
            got=f"{kind} of out {out}, in {in_}"
            + (f", {delta.experts} experts" if kind == "experts" else ""),
            expected=f"a weight of shape {list(weight_shape)}",
            hint=OTHER_BASE,
        )
    if straight and transposed:
        if delta.layer.transposed_if_square is None:
            raise UnsupportedError(
                "the weight is square and could be stored either way round",
                tensor=name,
                got=list(weight_shape),
                hint="The base model's architecture must tell",
            )
        return delta.layer.transposed_if_square
    return transposed


def exchanged(part: LowRank) -> LowRank:
    """Return the factors of the transposed change: a' = bᵀ, b' = aᵀ, for each expert."""
    axes = (0, 2, 1) if len(part.a.shape) == 3 else (1, 0)
    swapped, turn = part.layer.swapped, part.layer.transposed_if_square
    layer = replace(
        part.layer,
        swapped=None if swapped is None else not swapped,
        transposed_if_square=None if turn is None else not turn,
    )
    return replace(part, a=part.b.transposed(axes), b=part.a.transposed(axes), layer=layer)


def _fits(matrix: tuple[int, ...], known: tuple[int | None, int | None]) -> bool:
    return len(matrix) == 2 and all(
        side is None or side == found for side, found in zip(known, matrix, strict=True)
    )
