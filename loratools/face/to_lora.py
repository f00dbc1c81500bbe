"""`to_lora`: an adapter of any kind as a plain LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from loratools.algebra.ranks import RankRule
from loratools.base.named_base import about_base
from loratools.face.choices import ChoiceRow, choice_rows
from loratools.face.declare import public
from loratools.face.result import AdapterResult, Result, check_error
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
from loratools.folding.expert_order import overruled
from loratools.lowrank.resize import ComputeOptions
from loratools.operations import to_lora as operation
from loratools.operations.reported import written_nbytes
from loratools.operations.to_lora import ToLoraModuleReport, ToLoraOptions
from loratools.work.requests import Progress, Reading, Writing
from loratools.work.selection import Dropping
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError, UnsupportedError


@dataclass(frozen=True, kw_only=True, repr=False)
class ToLoraResult(AdapterResult):
    """A plain LoRA.

    Attributes:
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all modules together, of the stored, rounded factors.
        bytes_in: size of the input's weight file.
        bytes_out: size of the output's.
        cautions: what a user should know of the kinds that took part.
        modules: one report each, in path order.
    """

    operation: ClassVar[str] = "to-lora"

    relative_error: float
    bytes_in: int
    bytes_out: int
    cautions: tuple[str, ...]
    modules: tuple[ToLoraModuleReport, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class ToLoraChoices(Result):
    """What each rank would cost and lose, for a change that is not of low rank.

    Attributes:
        bytes_in: size of the input's weight file.
        low_rank_energy: share of DoRA modules' energy in their rescaled factors; None without any.
        rescaling_energy: share of it in the rescaling of the base; the two overlap.
        choices: one row for each rank.
    """

    operation: ClassVar[str] = "to-lora"

    bytes_in: int
    low_rank_energy: float | None
    rescaling_energy: float | None
    choices: tuple[ChoiceRow, ...]


@public(reading=READING, writing=(*IN_PLACE, "max_error"))
def to_lora(
    source: Source,
    *,
    base: Model | None = None,
    initial: Source | None = None,
    folding: ToLoraOptions,
    rule: RankRule,
    compute: ComputeOptions,
    dropping: Dropping,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> ToLoraResult:
    """Turn an adapter of any kind into a plain LoRA.

    A kind whose change is a product of two factors is converted exactly and needs no rule; any
    other is approximated at the rank asked for. New factors are float32 unless `dtype` says
    otherwise.

    >>> import loratools as lt
    >>> base = "examples/tiny-llama/model"
    >>> lt.to_lora("examples/tiny-llama/dora", base=base, rank=16).modules[0].kind
    'dora'

    Args:
        source: an adapter of any kind.
        base: the base model, for kinds that depend on it.
        initial: the adapter as saved before training, for PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: no rule where a change has no exact factors, or options that contradict.
        InexactError: the error is above `max_error`; the error carries the result.
        UnsupportedError: the change is not known, or not without the base.
        AdapterError: NaN or infinite values, or tensors that do not fit.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    if folding.exact and rule.is_given:
        raise OptionError("`exact=True` keeps changes whole, so there is no rank to choose")
    given = trained(source, initial, reading, dropping)
    adapter, settings = overruled(given.adapter, dict(folding.set_))
    checkpoint = None if base is None else model_or_pipeline(base)
    writing = destination(writing, given.inputs[0], [*given.inputs, checkpoint])
    done = operation.to_lora(
        adapter,
        rule,
        compute,
        base=checkpoint,
        given=settings,
        whole=folding.exact,
        scratch_folder=beside(writing),
        progress=progress,
    )
    _check_format(done.adapter)
    result = ToLoraResult.of(
        done,
        findings=(*given.findings, *about_base(given.inputs[:1], checkpoint)),
        bytes_in=given.adapter.weights_nbytes,
        bytes_out=written_nbytes(done.adapter),
    )
    check_error(result, writing.max_error)
    return result.written(writing)


@public(reading=READING, folding=("set_",))
def to_lora_choices(
    source: Source,
    *,
    base: Model | None = None,
    initial: Source | None = None,
    folding: ToLoraOptions,
    compute: ComputeOptions,
    dropping: Dropping,
    reading: Reading,
) -> ToLoraChoices | None:
    """Return what each rank would cost and lose; None if every module folds exactly.

    >>> import loratools as lt
    >>> lt.to_lora_choices("examples/tiny-llama/lora") is None
    True

    Args:
        source: as for `to_lora`.
        base: as for `to_lora`.
        initial: as for `to_lora`.

    Raises:
        UnsupportedError: the change is not known, or not without the base.
        AdapterError: NaN or infinite values, or tensors that do not fit.
    """
    adapter = trained(source, initial, reading, dropping).adapter
    adapter, settings = overruled(adapter, dict(folding.set_))
    checkpoint = None if base is None else model_or_pipeline(base)
    found = operation.to_lora_choices(adapter, compute, base=checkpoint, given=settings)
    if found is None:
        return None
    rows = choice_rows(found.choices)
    return ToLoraChoices.of(found, bytes_in=adapter.weights_nbytes, choices=rows)


def _check_format(adapter: Adapter) -> None:
    """Refuse full differences in a format that has none, even if nothing is to be written."""
    found = get_format(adapter.format).losses(adapter)
    if found:
        raise UnsupportedError(
            f"format {adapter.format} cannot hold it: {found[0].reason}",
            tensor=found[0].name,
            hint="Choose a rank, or put the change into the model: "
            "loratools fuse MODEL ADAPTER -o fused",
        )
