"""`fuse`: adapters added into base weights."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from loratools.base.named_base import about_base
from loratools.face.declare import public
from loratools.face.fuse_parts import FusePart, spread
from loratools.face.output_names import check_model_name
from loratools.face.result import InputAdapter, Reported
from loratools.face.source import (
    WRITING,
    CopiedModel,
    Weighted,
    destination,
    label,
    left,
    model,
    opened,
    weighted,
)
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.gguf import GgufFuseOptions, GgufFusion
from loratools.operations.fuse.operation import Fusion
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.fuse.parts import Parts, Spreading
from loratools.operations.fuse.pipeline import PipelineFusion
from loratools.operations.fuse.result import FusePreview
from loratools.operations.fuse.result import FuseResult as Fused
from loratools.work.json_object import hidden
from loratools.work.requests import Progress, Reading, Writing
from loratools.work.selection import Dropping
from loratools.work.shard import Shard
from loratools_formats.checkpoints.pipelines import is_pipeline
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.contract.path_kinds import is_model
from loratools_formats.contract.registry import is_recognised
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import OptionError, UnknownFormatError

_AnyFusion = Fusion | GgufFusion | PipelineFusion


@dataclass(frozen=True)
class FusedTensor:
    """What fusing did to one tensor.

    Attributes:
        name: its key.
        modules: the adapters' modules that change it; empty for a replacement.
        dtype: type it is stored in.
        base_norm: ‖W‖.
        delta_norm: ‖ΔW‖, that of the difference for a replacement.
        rounding_norm: ‖W' − (W + ΔW)‖, where W' is stored.
        surviving: share of ΔW found in the stored tensor; None if it is not quantised again.
        relative_change: ‖ΔW‖/‖W‖, None if W is zero.
        lost_to_rounding: share of ΔW lost to rounding.
    """

    name: str
    modules: tuple[str, ...]
    dtype: str
    base_norm: float
    delta_norm: float
    rounding_norm: float
    surviving: float | None
    relative_change: float | None
    lost_to_rounding: float


@dataclass(frozen=True, kw_only=True, repr=False)
class FuseResult(Reported):
    """A fused checkpoint that was written.

    Attributes:
        adapters: what was fused in, in order.
        relative_change: ‖ΔW‖/‖W‖ over all touched tensors; None if W is zero there.
        lost_to_rounding: share of ΔW lost to rounding over all touched tensors.
        bytes_out: size of the weight files.
        files: their names.
        surviving: share of ΔW that survives quantising again; None if nothing is quantised.
        quantising_error: ‖W' − (W + ΔW)‖/‖ΔW‖ of what is quantised again; above 1 it is noise,
            whatever share survives; None if nothing is quantised.
        base_rounding: ‖W − dq(q(W))‖/‖ΔW‖, how far `trained_on` moved the base first; None without.
        copied: number of tensors copied byte for byte.
        converted: number of tensors that no adapter changes, stored in another type than before.
        left_out: files of the base that were not carried over.
        tensors: every touched tensor, in the base's order.
    """

    operation: ClassVar[str] = "fuse"

    adapters: tuple[InputAdapter, ...]
    relative_change: float | None
    lost_to_rounding: float
    bytes_out: int
    files: tuple[str, ...]
    surviving: float | None
    quantising_error: float | None
    base_rounding: float | None
    copied: int
    converted: int
    left_out: tuple[str, ...]
    tensors: tuple[FusedTensor, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that fusing would change.

    Attributes:
        name: its key.
        shape: its shape in the base.
        dtype: type it would be stored in.
        modules: the adapters' modules that change it; empty for a replacement.
        replaced_by: name of the adapter that replaces it, None if none does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    modules: tuple[str, ...]
    replaced_by: str | None


@dataclass(frozen=True, kw_only=True, repr=False)
class FusePlan(Reported):
    """What fusing would write; `write(path)` does it.

    Attributes:
        dry_run: always True.
        bytes_out: size of the weight files.
        tensors: those that adapters change.
        total: number of tensors in all.
        files: number of weight files.
        fusion: the plan itself.
        progress: called with (bytes done, bytes in all).
    """

    operation: ClassVar[str] = "fuse"

    dry_run: bool
    bytes_out: int
    tensors: tuple[PlannedTensor, ...]
    total: int = hidden()
    files: int = hidden()
    fusion: _AnyFusion = hidden()
    progress: Progress | None = hidden()

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> FuseResult:
        """Write the fused checkpoint, whole or not at all, and say what it did.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: not enough space, or writing failed; nothing was changed.
            AdapterError: an input is malformed, or values are not finite.
            UnsupportedError: less than half of the change survives quantising.
        """
        done = self.fusion.write(path, overwrite=overwrite, progress=self.progress)
        return _result(self.fusion.inputs, done, self.findings)


@public(reading=("from_", "ignore_key"), quantised=("fallback",), writing=WRITING)
def fuse(
    base: CopiedModel,
    adapters: Weighted,
    *,
    options: FuseOptions,
    quantised: GgufFuseOptions,
    dropping: Dropping,
    reading: Reading,
    spreading: Spreading,
    writing: Writing,
    progress: Progress | None = None,
) -> FuseResult | FusePlan | FusePart:
    """Fuse adapters into base weights, streamed: W' = W + Σ weight · ΔW, rounded once.

    With `output`, the checkpoint is written and the result says what was done. Without it, the
    result is a plan with a method `write`. With `shard`, the result lists the weight files that
    were written and those that are awaited, unless all are complete.

    >>> import loratools as lt
    >>> plan = lt.fuse("examples/tiny-llama/model", {"examples/tiny-llama/lora": 0.5})
    >>> len(plan.tensors), plan.tensors[0].dtype
    (28, 'BF16')

    Args:
        base: a checkpoint folder, a diffusers pipeline, a safetensors file or a GGUF model.
        adapters: adapters, or a mapping from them to weights; a negative weight takes one out
            again.
        progress: called with (bytes done, bytes in all).

    Raises:
        OptionError: an option that has no meaning for this base.
        AdapterError: a module that does not fit, or values that are not finite.
        UnsupportedError: a change that cannot be added, or that quantising erases.
        OutputExistsError: the output exists and `overwrite` is false.
        OutputError: not enough space, or writing failed; nothing was changed.
    """
    inputs = _inputs(base, adapters, reading, dropping)
    read = [item.adapter for item in inputs]
    fusion: _AnyFusion
    if isinstance(base, str | os.PathLike) and is_gguf(Path(base)):
        writing = destination(writing, None, [Path(base), *read])
        check_model_name(writing.output, ".gguf")
        fusion = GgufFusion(read_model(Path(base)), inputs, _of_gguf(options, quantised))
    else:
        if quantised.fallback is not None:
            raise OptionError("`fallback` has no meaning for a safetensors checkpoint")
        if isinstance(base, str | os.PathLike) and is_pipeline(Path(base)):
            writing = destination(writing, None, [Path(base), *read])
            check_model_name(writing.output, "folder")
            fusion = PipelineFusion(Path(base), inputs, options)
        else:
            checkpoint = model(base)
            writing = destination(writing, None, [checkpoint, *read])
            check_model_name(writing.output, "folder" if checkpoint.is_folder else ".safetensors")
            fusion = Fusion(checkpoint, inputs, options)
    about = about_base(read, Path(base) if isinstance(base, str | os.PathLike) else base)
    told = dict.fromkeys(notice for item in read for notice in item.notices)
    plan = _plan(fusion.preview, fusion, progress, (*about, *told))
    if writing.output is None:
        return plan
    if not spreading.is_given:
        return plan.write(writing.output, overwrite=writing.overwrite)
    if not isinstance(fusion, Fusion) or not checkpoint.is_folder:
        raise OptionError(
            "the base has no weight files to spread", expected="a folder of a checkpoint"
        )
    parts = Parts(fusion, writing.output)
    if spreading.scheduler is not None:
        given = {
            "base": base, "adapters": adapters, "options": options, "quantised": quantised,
            "dropping": dropping, "reading": reading, "writing": writing,
        }  # fmt: skip
        found = spread(spreading.scheduler, given, len(fusion.new.shards), progress)
        whole = [one for one in found if isinstance(one, FuseResult)]
        if whole:
            return whole[0]
    part = spreading.shard or Shard()
    written = parts.write(part, options.workers, progress)
    done = None if parts.missing() else parts.finish(overwrite=writing.overwrite)
    if done is not None:
        return _result(fusion.inputs, done, plan.findings)
    return FusePart(shard=str(part), written=tuple(written), awaited=tuple(parts.missing()))


def fuse_inputs(
    adapters: Any, reading: Reading, dropping: Dropping | None = None
) -> list[FuseInput]:
    """Return adapters with their weights and names, without the modules that are to leave.

    Raises:
        LoratoolsError: not an adapter, or not a weight.
    """
    given = weighted(adapters)
    read = left([opened(source, reading) for source, _ in given], dropping)
    return [
        FuseInput(adapter, weight, label(source))
        for adapter, (source, weight) in zip(read, given, strict=True)
    ]


def _inputs(base: object, adapters: Any, reading: Reading, dropping: Dropping) -> list[FuseInput]:
    """Return the inputs; raise another error for an adapter that is named before its model."""
    try:
        return fuse_inputs(adapters, reading, dropping)
    except UnknownFormatError as error:
        command = _in_order(base, adapters)
        if command is None:
            raise
        raise UnknownFormatError(
            "the adapter stands where the model belongs", path=str(base), hint=command
        ) from error


def _in_order(base: object, adapters: Any) -> str | None:
    """Return the command for those who name the adapter first; None if that is not what it is."""
    named = [source for source, _ in weighted(adapters)]
    if len(named) != 1 or not isinstance(named[0], str | os.PathLike):
        return None
    path = Path(named[0])
    if not (isinstance(base, str | os.PathLike) and is_model(path) and is_recognised(base)):
        return None
    model_given, adapter_given = (shlex.quote(os.fspath(each)) for each in (path, base))
    return f"The model comes first: loratools fuse {model_given} {adapter_given} -o fused"


_WORDS = {"max_shard_bytes": "max_shard_size"}


def _of_gguf(options: FuseOptions, quantised: GgufFuseOptions) -> GgufFuseOptions:
    for name in ("max_shard_bytes", "base_mode", "requantize", "changed_bits", "trained_on"):
        if getattr(options, name):
            raise OptionError(f"`{_WORDS.get(name, name)}` has no meaning for a GGUF model")
    given: Any = options.dtype or "keep"
    return GgufFuseOptions(
        outtype=given,
        fallback=quantised.fallback,
        workers=options.workers,
        device=options.device,
        allow_lossy=options.allow_lossy,
    )


def _plan(
    preview: FusePreview,
    fusion: _AnyFusion,
    progress: Progress | None,
    about: tuple[Finding, ...],
) -> FusePlan:
    return FusePlan(
        dry_run=True,
        bytes_out=preview.nbytes,
        tensors=tuple(
            PlannedTensor(
                plan.key,
                tuple(plan.source.shape),
                preview.dtypes[plan.key],
                tuple(plan.modules),
                plan.replaced_by,
            )
            for plan in preview.touched
        ),
        total=preview.total,
        files=preview.files,
        findings=tuple(dict.fromkeys((*about, *preview.findings))),
        fusion=fusion,
        progress=progress,
    )


def _result(inputs: tuple[FuseInput, ...], done: Fused, planned: tuple[Finding, ...]) -> FuseResult:
    return FuseResult.of(
        done,
        adapters=tuple(InputAdapter(item.name, item.weight) for item in inputs),
        lost_to_rounding=done.lost,
        bytes_out=done.nbytes,
        files=done.shards,
        findings=tuple(dict.fromkeys((*planned, *done.findings))),
        tensors=tuple(
            FusedTensor(
                name=report.key,
                relative_change=report.relative_change,
                lost_to_rounding=report.lost,
                **{
                    one.name: getattr(report, one.name)
                    for one in fields(report)[1:]
                    if one.name not in ("rounded", "base_rounding")
                },
            )
            for report in done.tensors
        ),
    )
