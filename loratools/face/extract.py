"""`extract`: the LoRA between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from loratools.algebra.ranks import RankRule
from loratools.face.choices import ChoiceRow, choice_rows
from loratools.face.declare import public
from loratools.face.result import AdapterResult, Result, check_error
from loratools.face.source import WRITING, Model, beside, destination, model_or_pipeline
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.convert.operation import prepare
from loratools.operations.convert.options import SingleFileOptions
from loratools.operations.extract import operation
from loratools.operations.extract.single_file import (
    components_only,
    named_in_single_files,
    taken_apart,
)
from loratools.operations.reported import written_nbytes
from loratools.work.provenance import record_metadata
from loratools.work.requests import Progress, Writing
from loratools.work.selection import Selection
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.format import Context
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import OptionError
from loratools_formats.disk.provenance import with_record


@dataclass(frozen=True)
class ExtractedModule:
    """One module's change.

    Attributes:
        name: module path.
        rank: of the factors; None if it is kept whole.
        energy: share of ‖ΔW‖²_F in the singular values kept.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the stored, rounded factors.
    """

    name: str
    rank: int | None
    energy: float
    relative_error: float


@dataclass(frozen=True, kw_only=True, repr=False)
class ExtractResult(AdapterResult):
    """The LoRA between two checkpoints.

    Attributes:
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all modules together, of the stored, rounded factors.
        bytes_out: size of the output's weight file.
        unchanged: number of tensors that are equal in both.
        skipped: tensors that changed and were not selected.
        replaced: tensors that are carried whole.
        modules: one report each, in path order.
    """

    operation: ClassVar[str] = "extract"

    relative_error: float
    bytes_out: int
    unchanged: int
    skipped: tuple[str, ...]
    replaced: tuple[str, ...]
    modules: tuple[ExtractedModule, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class ExtractChoices(Result):
    """What each rank would cost and lose.

    Attributes:
        choices: one row for each rank.
    """

    operation: ClassVar[str] = "extract"

    choices: tuple[ChoiceRow, ...]


@public(writing=(*WRITING, "max_error"))
def extract(
    base: Model,
    tuned: Model,
    *,
    naming: operation.Naming,
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
    writing: Writing,
    progress: Progress | None = None,
) -> ExtractResult:
    """Extract the LoRA between two checkpoints, as a PEFT adapter or a single file.

    >>> import tempfile
    >>> import loratools as lt
    >>> base = "examples/tiny-llama/model"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fused = lt.fuse(base, "examples/tiny-llama/lora", output=f"{folder}/tuned")
    ...     lt.extract(base, f"{folder}/tuned", rank=4).modules[0].rank
    4

    Args:
        base: the model before training.
        tuned: the model after.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: no rule for the ranks.
        InexactError: the error is above `max_error`; the error carries the result.
        AdapterError: a tensor is in only one of the two, nothing changed, or NaN and infinite
            values.
        UnsupportedError: a tensor that has no place in a LoRA changed.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    rule.require(hint="extract_choices shows what each rank costs")
    before, after = _both(base, tuned, naming)
    writing = destination(writing, None, [before, after])
    single = naming.to not in (None, "peft")
    old, new = components_only(before, after) if single else (before, after)
    found = _difference(old, new, selection, compute, naming.base_name)
    if single:
        found = replace(found, adapter=taken_apart(found.adapter))
    done = operation.extract(
        before,
        after,
        found,
        rule,
        compute,
        to=naming.to if single else None,
        scratch_folder=beside(writing),
        progress=progress,
    )
    adapter, findings = done.adapter, found.findings
    if single and naming.to is not None:
        adapter, more = _single_file(adapter, before, after, naming.to, naming.component)
        findings = (*findings, *more)
    result = ExtractResult(
        adapter=adapter,
        findings=findings,
        relative_error=done.relative_error,
        bytes_out=written_nbytes(adapter),
        unchanged=found.unchanged,
        skipped=found.skipped,
        replaced=tuple(r.target for r in adapter.replacements.values()),
        modules=tuple(
            ExtractedModule(module.name, module.rank, module.energy, module.relative_error)
            for module in done.modules
        ),
    )
    check_error(result, writing.max_error)
    return result.written(writing)


@public(naming=("to",))
def extract_choices(
    base: Model,
    tuned: Model,
    *,
    naming: operation.Naming,
    compute: ComputeOptions,
    selection: Selection,
) -> ExtractChoices:
    """Return what each rank of the LoRA between two checkpoints would cost and lose.

    >>> import tempfile
    >>> import loratools as lt
    >>> base = "examples/tiny-llama/model"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fused = lt.fuse(base, "examples/tiny-llama/lora", output=f"{folder}/tuned")
    ...     lt.extract_choices(base, f"{folder}/tuned").choices[0].rank
    1

    Args:
        base: as for `extract`.
        tuned: as for `extract`.

    Raises:
        AdapterError: as for `extract`.
        UnsupportedError: as for `extract`.
    """
    before, after = _both(base, tuned, naming)
    single = naming.to not in (None, "peft")
    if single:
        before, after = components_only(before, after)
    found = _difference(before, after, selection, compute, None)
    if single:
        found = replace(found, adapter=taken_apart(found.adapter))
    return ExtractChoices(choices=choice_rows(operation.extract_choices(found, compute).choices))


def _both(base: Model, tuned: Model, naming: operation.Naming) -> tuple[Checkpoint, Checkpoint]:
    """Return both checkpoints. Pipelines stay whole, since their LoRA is a single file.

    Raises:
        OptionError: a PEFT folder of a pipeline is asked for, or one of the two is no pipeline.
    """
    before, after = model_or_pipeline(base), model_or_pipeline(tuned)
    if bool(before.components) != bool(after.components):
        pipeline, other = (before, after) if before.components else (after, before)
        raise OptionError(
            "one is a whole diffusion pipeline, and the other is not",
            path=pipeline.path,
            got=str(other.path),
            hint=f"Give the component's folder: {pipeline.path / pipeline.components[0]}",
        )
    if before.components and naming.to in (None, "peft"):
        raise OptionError(
            "a PEFT folder is of one model, and this is a whole diffusion pipeline",
            path=before.path,
            hint='Pass `to="diffusers"`, which makes one file of all components',
        )
    return before, after


def _single_file(
    adapter: Adapter, before: Checkpoint, after: Checkpoint, to: str, component: str | None
) -> tuple[Adapter, tuple[Finding, ...]]:
    """Return the adapter with the names of a single file, and findings about the names."""
    named, findings = named_in_single_files(adapter, before, after, component, to)
    try:
        context = Context(base=before.path)
        done = prepare(named, to, context, single=SingleFileOptions(component=component))
    except OptionError as error:
        if error.hint is not None and "`names`" in error.hint:  # which is an option of `convert`
            error.hint = (
                'Extract it with `to="diffusers"`, and convert that: '
                f"loratools convert EXTRACTED --names TABLE --to {to} -o OUT.safetensors"
            )
        raise
    record = adapter.provenance or {}
    metadata = with_record(done.adapter.metadata, record_metadata(record))
    made = replace(done.adapter, metadata=metadata, provenance=record)
    return made, (*findings, *done.findings)


def _difference(
    before: Checkpoint,
    after: Checkpoint,
    selection: Selection,
    compute: ComputeOptions,
    base_name: str | None,
) -> operation.Difference:
    recorded = base_name or _recorded_name(before) or str(before.path)
    return operation.difference(
        before, after, selection, base_name=recorded, workers=compute.threads
    )


def _recorded_name(base: Checkpoint) -> str | None:
    name = base.config.get("_name_or_path")
    return name if isinstance(name, str) and name and not Path(name).is_absolute() else None
