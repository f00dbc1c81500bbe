"""What `place` returns: one record for each change of a base tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loratools_formats.core.adapter import Replacement
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef

Span = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """One change of one base tensor; a delta may have several, and so may a tensor.

    Attributes:
        key: the tensor it changes; for an untied weight, the new one.
        module: the adapter's module, for messages.
        delta: the module's delta.
        transposed: whether the tensor is stored as (in, out) rather than (out, in).
        plane: for a stacked 3-D tensor, which of its matrices; None for all, one expert each.
        expert: for stacked experts, which of them; None for all, or if there is only one.
        outputs: which outputs of the matrix it changes, in order; empty for all.
        rows: which outputs of the delta go there, in order; empty for all.
    """

    key: str
    module: str
    delta: ModuleChange
    transposed: bool
    plane: int | None = None
    expert: int | None = None
    outputs: tuple[Span, ...] = ()
    rows: tuple[Span, ...] = ()


@dataclass(frozen=True)
class BiasPlacement:
    """What is added to a base bias or a norm: scale · bias.

    Attributes:
        key: the base tensor.
        module: the adapter's module, for messages.
        bias: (out,).
        scale: the number that multiplies it.
        outputs: which elements of the base tensor it changes, in order; empty for all.
        rows: which elements of `bias` go there, in order; empty for all.
    """

    key: str
    module: str
    bias: TensorRef
    scale: float = 1.0
    outputs: tuple[Span, ...] = ()
    rows: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Placements:
    """Everything one adapter changes in a checkpoint.

    Attributes:
        deltas: changes of weights.
        biases: changes of biases.
        replacements: tensors that replace others or rows of them, by base key, in order. A part of
            a fused weight or bias becomes `token_rows` of it. A key may be new: an untied weight,
            or the head of a task.
        untied: new tensors by name, with the stored tensor that each begins as a copy of; the
            config must then say that embeddings are not tied.
        findings: what a user should know.
    """

    deltas: tuple[Placement, ...]
    biases: tuple[BiasPlacement, ...]
    replacements: tuple[tuple[str, Replacement], ...]
    untied: Mapping[str, str]
    findings: tuple[Finding, ...]
