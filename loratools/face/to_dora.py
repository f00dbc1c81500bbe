"""`to_dora`: a LoRA as a DoRA that makes the same change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratools.base.named_base import about_base
from loratools.face.declare import public
from loratools.face.result import AdapterResult
from loratools.face.source import (
    IN_PLACE,
    READING,
    Model,
    Source,
    beside,
    destination,
    model_or_pipeline,
    trained,
)
from loratools.operations import to_dora as operation
from loratools.operations.to_dora import ToDoraModuleReport
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Reading, Writing


@dataclass(frozen=True, kw_only=True, repr=False)
class ToDoraResult(AdapterResult):
    """A DoRA.

    Attributes:
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all modules together, by the rounding of magnitudes;
            None if every ΔW is zero.
        modules: one report each, in path order.
    """

    operation: ClassVar[str] = "to-dora"

    relative_error: float | None
    modules: tuple[ToDoraModuleReport, ...]


@public(reading=READING, writing=IN_PLACE)
def to_dora(
    source: Source,
    *,
    base: Model,
    initial: Source | None = None,
    threads: Workers,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> ToDoraResult:
    """Turn a LoRA into a DoRA that makes the same change.

    The factors stay; every output gets ‖W + ΔW‖ as magnitude: (out,), rounded to float32.

    >>> import loratools as lt
    >>> result = lt.to_dora("examples/tiny-llama/lora", base="examples/tiny-llama/model")
    >>> result.modules[0].outputs
    128

    Args:
        source: an adapter that is plain or folds exactly without the base's weights.
        base: the base model.
        initial: the adapter as saved before training, for PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.
        progress: called with (modules done, modules in all).

    Raises:
        UnsupportedError: it is a DoRA already, its factors do not tell its change, or a module
            cannot be a DoRA.
        AdapterError: a module does not fit the base, or NaN and infinite values.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    given = trained(source, initial, reading)
    checkpoint = model_or_pipeline(base)
    writing = destination(writing, given.inputs[0], [*given.inputs, checkpoint])
    done = operation.to_dora(
        given.adapter,
        checkpoint,
        workers=threads.workers,
        scratch_folder=beside(writing),
        progress=progress,
    )
    findings = (*given.findings, *about_base(given.inputs[:1], checkpoint))
    return ToDoraResult.of(done, findings=findings).written(writing)
