"""`repair`: an adapter without the faults that its spectrum shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from loratools.base.decompositions import IntruderOptions
from loratools.face.declare import public
from loratools.face.result import AdapterResult, check_error
from loratools.face.source import (
    IN_PLACE,
    READING,
    Model,
    Source,
    beside,
    destination,
    model_or_pipeline,
    opened,
)
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.repair import operation
from loratools.operations.repair.result import RepairOptions, RepairReport
from loratools.work.requests import Progress, Reading, Writing
from loratools.work.selection import Selection


@dataclass(frozen=True, kw_only=True, repr=False)
class RepairResult(AdapterResult):
    """A repaired adapter.

    Attributes:
        change: ‖edits‖/‖ΔW‖ over all modules.
        relative_error: ‖intended − stored‖/‖intended‖ over all modules.
        modules: one report each, in path order.
    """

    operation: ClassVar[str] = "repair"

    change: float
    relative_error: float
    modules: tuple[RepairReport, ...]


@public(reading=READING, writing=(*IN_PLACE, "max_error"), compute=("dtype", "workers"))
def repair(
    source: Source,
    *,
    base: Model | None = None,
    options: RepairOptions,
    judging: IntruderOptions,
    compute: ComputeOptions,
    selection: Selection,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> RepairResult:
    """Shrink an adapter's intruder dimensions, drop dead modules, balance factors.

    Intruder dimensions are leading singular vectors of W + ΔW that are far from all singular
    vectors of W. Adapters with many of them forget more of what the base knew (arXiv 2410.21228).

    >>> import loratools as lt
    >>> base = "examples/tiny-llama/model"
    >>> found = lt.repair("examples/tiny-llama/lora", base=base, include="layers.0.self_attn")
    >>> sum(module.intruders for module in found.modules) > 0
    True

    Args:
        source: a LoRA or DoRA, or of a kind that folds exactly without the base.
        base: the base model, for intruder dimensions.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: intruder dimensions are asked for without a base, or nothing is to be done.
        InexactError: the error is above `max_error`; the error carries the result.
        UnsupportedError: a module has no factors, or is a DoRA with magnitudes of inputs.
        AdapterError: NaN or infinite values, nothing selected, or every module is dead.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    adapter = opened(source, reading)
    checkpoint = None if base is None else model_or_pipeline(base)
    writing = destination(writing, adapter, [adapter, checkpoint], adapter.format)
    done = operation.repair(
        adapter,
        replace(options, intruders=judging),
        base=checkpoint,
        compute=compute,
        selection=selection,
        workers=compute.workers,
        scratch_folder=beside(writing),
        progress=progress,
    )
    result = RepairResult.of(done, findings=adapter.notices)
    check_error(result, writing.max_error)
    return result.written(writing)
