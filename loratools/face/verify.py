"""`verify`: whether a checkpoint is a base with adapters fused in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

from loratools.face.declare import public
from loratools.face.fuse import fuse_inputs
from loratools.face.result import Reported
from loratools.face.source import Model, Weighted, model
from loratools.hub.references import path_of
from loratools.operations import verify as operation
from loratools.operations.verify import TensorVerdict, Verdict
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Reading
from loratools_formats.checkpoints.pipelines import is_pipeline


@dataclass(frozen=True, kw_only=True, repr=False)
class VerifyResult(Reported):
    """What was found in a checkpoint.

    Attributes:
        contained: whether the adapters are contained; None if the checkpoint cannot tell.
        told: share of ‖ΔW‖², over all tensors, whose presence or absence shows.
        counts: number of tensors by verdict.
        tensors: every tensor of either checkpoint.
    """

    operation: ClassVar[str] = "verify"

    contained: bool | None
    told: float
    counts: Mapping[Verdict, int]
    tensors: tuple[TensorVerdict, ...]


@public(reading=("from_", "ignore_key"))
def verify(
    fused: Model,
    *,
    base: Model,
    adapters: Weighted,
    threads: Workers,
    reading: Reading,
    progress: Progress | None = None,
) -> VerifyResult:
    """Return, for each tensor, whether a checkpoint is the base with the adapters fused in.

    >>> import loratools as lt
    >>> model = "examples/tiny-llama/model"
    >>> lt.verify(model, base=model, adapters="examples/tiny-llama/lora").contained
    False

    Args:
        fused: the checkpoint in question.
        base: what it is said to be made from.
        adapters: what it should contain: adapters, or a mapping to their weights.
        progress: called with (tensors done, tensors in all).

    Raises:
        AdapterError: malformed input, or an adapter that does not fit the base.
        UnsupportedError: a quantisation or an adapter that cannot be read.
    """
    inputs = fuse_inputs(adapters, reading)
    if _is_pipeline(fused) and _is_pipeline(base):
        found = operation.verify_pipeline(
            path_of(fused), path_of(base), inputs, workers=threads.workers, progress=progress
        )
    else:
        found = operation.verify(
            model(fused), model(base), inputs, workers=threads.workers, progress=progress
        )
    told = dict.fromkeys(each for item in inputs for each in item.adapter.notices)
    return VerifyResult(
        contained=found.contained,
        told=found.told,
        counts=found.counts,
        tensors=found.tensors,
        findings=tuple(told),
    )


def _is_pipeline(given: Model) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(given, str | os.PathLike) and is_pipeline(path_of(given))
