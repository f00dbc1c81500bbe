"""Formats of quantised weights: one file for each, all with one interface.

A codec says which stored tensors make up one weight (`declare`), a `CodedWeight` computes any range
of its values, and its `encoder` stores a range of new ones with the scales that are there. Nothing
outside this package knows a format by name: `coded_weights` asks every codec, in an order in which
each sees only what those before it left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from loratools.base.codecs import (
    auto_round,
    awq,
    bitsandbytes,
    comfyui,
    compressed,
    eight_bit,
    gptq,
    hqq,
    int8_rows,
    mlx,
    mxfp4,
    nvfp4,
    torchao,
)
from loratools.base.codecs.codec import (
    Codec,
    CodedWeight,
    Encoder,
    Scheme,
    Stored,
    WholeEncoder,
)
from loratools.base.codecs.transposed import Transposed
from loratools_formats.checkpoints.facts import is_conv1d
from loratools_formats.checkpoints.siblings import wrong_shape

__all__ = [
    "CODECS",
    "Codec",
    "CodedWeight",
    "Encoder",
    "Scheme",
    "Stored",
    "WholeEncoder",
    "coded_weights",
    "methods",
    "without_marks",
]

CODECS: tuple[Codec, ...] = (
    bitsandbytes.CODEC,
    int8_rows.CODEC,
    comfyui.CODEC,
    hqq.CODEC,
    torchao.CODEC,
    mlx.CODEC,
    gptq.CODEC,
    awq.CODEC,
    compressed.CODEC,
    auto_round.CODEC,
    nvfp4.CODEC,
    mxfp4.CODEC,
    eight_bit.CODEC,
)


def coded_weights(stored: Stored) -> dict[str, CodedWeight]:
    """Return the quantised weights of a checkpoint by their plain names.

    Raises:
        AdapterError: tensors of a weight are missing or contradict each other.
        UnsupportedError: a variant whose values are not known.
    """
    found: dict[str, CodedWeight] = {}
    for codec in CODECS:
        declared = codec.declare(stored)
        for weight in declared.values():
            if not all(weight.shape):
                raise wrong_shape(weight.parts[0], "a weight that has values")
        found |= declared if codec.keeps_conv1d else _as_held(declared, stored)
        stored = stored.without(part.key for weight in declared.values() for part in weight.parts)
    return found


def _as_held(weights: Mapping[str, CodedWeight], stored: Stored) -> dict[str, CodedWeight]:
    """Return weights as the model holds them, those of Conv1D layers (in, out)."""

    def held(key: str, weight: CodedWeight) -> CodedWeight:
        is_transposed = len(weight.shape) == 2 and is_conv1d(key, stored.config)
        return Transposed(weight) if is_transposed else weight

    return {key: held(key, weight) for key, weight in weights.items()}


def without_marks(metadata: Mapping[str, str], weights: Collection[str]) -> dict[str, str]:
    """Return a file's metadata without what it says of weights that are plain now."""
    for codec in CODECS:
        if codec.without_marks is not None:
            metadata = codec.without_marks(metadata, weights)
    return dict(metadata)


def methods(codecs: Iterable[Codec] = CODECS) -> frozenset[str]:
    """Return the names that configurations give the quantisations that can be read."""
    return frozenset(name for codec in codecs for name in codec.methods)
