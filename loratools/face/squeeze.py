"""`squeeze`: an adapter at lower ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratools.algebra.ranks import RankRule
from loratools.face.choices import ChoiceRow, choice_rows
from loratools.face.declare import public
from loratools.face.result import AdapterResult, Result, check_error
from loratools.face.source import IN_PLACE, READING, Source, beside, destination, trained
from loratools.lowrank.moments import Calibration, read_moments
from loratools.lowrank.resize import ComputeOptions
from loratools.operations import squeeze as operation
from loratools.operations.reported import written_nbytes
from loratools.operations.squeeze import ModuleReport
from loratools.work.requests import Progress, Reading, Writing
from loratools.work.selection import Dropping, Selection


@dataclass(frozen=True, kw_only=True, repr=False)
class SqueezeResult(AdapterResult):
    """A squeezed adapter.

    Attributes:
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all modules together, of the stored, rounded factors.
        directional: whether modules are DoRA, whose error is that of the direction.
        bytes_in: size of the input's weight file.
        bytes_out: size of the output's.
        modules: one report each, in path order.
        kept_whole: modules without factors and modules not selected, which keep every bit.
        calibrated_error: ‖(ΔW − ΔW')·X‖/‖ΔW·X‖ over the selected modules together, for the inputs
            whose moments were given; None without.
    """

    operation: ClassVar[str] = "squeeze"

    relative_error: float
    directional: bool
    bytes_in: int
    bytes_out: int
    modules: tuple[ModuleReport, ...]
    kept_whole: tuple[str, ...]
    calibrated_error: float | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class SqueezeChoices(Result):
    """What each rank would cost and lose.

    Attributes:
        bytes_in: size of the input's weight file.
        choices: one row for each rank.
    """

    operation: ClassVar[str] = "squeeze"

    bytes_in: int
    choices: tuple[ChoiceRow, ...]


@public(reading=READING, writing=(*IN_PLACE, "max_error"))
def squeeze(
    source: Source,
    *,
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
    dropping: Dropping,
    calibration: Calibration,
    initial: Source | None = None,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> SqueezeResult:
    """Compress an adapter's ranks with the smallest possible error.

    Every ΔW = scale · b @ a, with a: (r, in) and b: (out, r), is decomposed from its factors, and
    its leading singular triplets become new factors. Their scale is 1, unless `keep_alpha` or the
    format decides otherwise.

    >>> import loratools as lt
    >>> result = lt.squeeze("examples/tiny-llama/lora", rank=8)
    >>> result.modules[0].rank_out
    8

    Args:
        source: an adapter of any kind that has factors, or that folds into factors exactly.
        initial: the adapter as saved before training, for PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: no rule for the ranks, options that contradict each other, or a budget that is
            too small.
        InexactError: the error is above `max_error`; the error carries the result.
        UnsupportedError: the factors do not tell the true ΔW.
        AdapterError: nothing to squeeze, NaN or infinite values, or values beyond the type.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    rule.require(hint="squeeze_choices shows what each rank costs")
    given = trained(source, initial, reading, dropping)
    writing = destination(writing, given.inputs[0], given.inputs, given.adapter.format)
    done = operation.squeeze(
        given.adapter,
        rule,
        compute,
        selection,
        moments=None if calibration.stats is None else read_moments(calibration.stats),
        scratch_folder=beside(writing),
        progress=progress,
    )
    result = SqueezeResult.of(
        done,
        findings=given.findings,
        bytes_in=given.adapter.weights_nbytes,
        bytes_out=written_nbytes(done.adapter),
    )
    check_error(result, writing.max_error)
    return result.written(writing)


@public(reading=READING)
def squeeze_choices(
    source: Source,
    *,
    compute: ComputeOptions,
    selection: Selection,
    dropping: Dropping,
    initial: Source | None = None,
    reading: Reading,
) -> SqueezeChoices:
    """Return what each rank would cost and lose.

    >>> import loratools as lt
    >>> [row.rank for row in lt.squeeze_choices("examples/tiny-llama/lora").choices][:3]
    [1, 2, 4]

    Args:
        source: as for `squeeze`.
        initial: as for `squeeze`.

    Raises:
        UnsupportedError: the factors do not tell the true ΔW.
        AdapterError: nothing to squeeze, or NaN or infinite values.
    """
    adapter = trained(source, initial, reading, dropping).adapter
    found = operation.rank_choices(adapter, compute, selection)
    return SqueezeChoices(bytes_in=adapter.weights_nbytes, choices=choice_rows(found))
