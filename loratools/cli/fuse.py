"""`loratools fuse`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.by_type import Column, print_modules
from loratools.cli.command import command as named_command
from loratools.cli.completion import path_completions
from loratools.cli.output import human_bytes, note, number, percent, quantity, say
from loratools.cli.pages import Pages
from loratools.cli.perform import perform, target_of
from loratools.cli.references import weighted_path
from loratools.face.fuse import FusePlan, FuseResult, PlannedTensor, fuse
from loratools.face.fuse_parts import FusePart
from loratools.operations.fuse.gguf import GgufFuseOptions
from loratools.operations.fuse.options import FuseOptions
from loratools.operations.fuse.parts import Spreading
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Dropping

_MATTERS = 0.01  # of ‖ΔW‖, from which on the rounding of the base shows


@named_command("fuse")
@shared.base_argument
@click.argument(
    "adapters",
    nargs=-1,
    required=True,
    metavar="ADAPTER[:WEIGHT]...",
    shell_complete=path_completions,
)
@shared.writes(positional=False)
@shared.takes(FuseOptions, into="options")
@shared.takes(GgufFuseOptions, "fallback", into="quantised")
@shared.takes(Dropping, into="dropping")
@shared.reads("from_", "ignore_key")
@shared.takes(Spreading, into="spreading")
@shared.takes(Pages, "html", "plot", into="pages")
@shared.reports("json", "quiet", "verbose")
def command(
    base: Path,
    adapters: tuple[str, ...],
    writing: Writing,
    options: FuseOptions,
    quantised: GgufFuseOptions,
    dropping: Dropping,
    reading: Reading,
    spreading: Spreading,
    pages: Pages,
    reporting: Reporting,
) -> int:
    """Fuse adapters into base weights, streamed, without loading a model.

    BASE is a checkpoint folder, a diffusers pipeline, a safetensors file or a GGUF model. A weight
    follows an adapter's path after a colon and is 1 by default; -1 takes a fused adapter out again,
    up to rounding.

    \b
    loratools fuse base-model my-adapter -o merged-model
    loratools fuse base-model chat:0.7 code:0.3 -o both --dtype bf16
    loratools fuse base.gguf my-adapter -o merged.gguf --dtype q8_0
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing, adapters[-1] if len(adapters) > 1 else None)
    sources = [weighted_path(text) for text in adapters]
    inputs = [base, *(path for path, _ in sources), target.output]
    pages.check(reporting, inputs, overwrite=writing.overwrite)
    return perform(
        "fuse",
        lambda progress: fuse(
            base,
            sources,
            options=options,
            quantised=quantised,
            dropping=dropping,
            reading=reading,
            spreading=spreading,
            writing=target,
            progress=progress,
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
        unit="B",
        pages=pages,
    )


def _show(result: FuseResult | FusePlan | FusePart, *, verbose: bool) -> None:
    if isinstance(result, FusePart):
        written, awaited = len(result.written), len(result.awaited)
        say(f"part {result.shard}: {quantity(written, 'file')} written, {awaited} awaited")
    elif isinstance(result, FusePlan):
        _show_plan(result, verbose=verbose)
    else:
        _show_fused(result, verbose=verbose)


def _show_plan(plan: FusePlan, *, verbose: bool) -> None:
    shapes = ["×".join(map(str, tensor.shape)) for tensor in plan.tensors]
    columns = [
        Column("shape", shapes, str, side="<"),
        Column("dtype", [tensor.dtype for tensor in plan.tensors], str, side="<"),
        Column("changed by", [_changed_by(tensor) for tensor in plan.tensors], str, side="<"),
    ]
    print_modules("tensor", [tensor.name for tensor in plan.tensors], columns, verbose=verbose)
    say(f"tensors: {len(plan.tensors)} of {plan.total} change")
    say(f"size: {human_bytes(plan.bytes_out)} in {quantity(plan.files, 'file')}")


def _changed_by(tensor: PlannedTensor) -> str:
    return ", ".join(tensor.modules) or f"replaced by {tensor.replaced_by or 'token rows'}"


def _show_fused(result: FuseResult, *, verbose: bool) -> None:
    tensors = result.tensors
    lost = [tensor.lost_to_rounding for tensor in tensors]
    changes = [tensor.relative_change for tensor in tensors]
    columns = [
        Column("dtype", [tensor.dtype for tensor in tensors], str, side="<"),
        Column("‖ΔW‖/‖W‖", changes, none="new", summed=True),
        Column("lost to rounding", lost, percent, summed=True),
    ]
    if result.surviving is not None:
        columns.append(Column("survives", [tensor.surviving for tensor in tensors], percent))
    print_modules("tensor", [tensor.name for tensor in tensors], columns, lost, verbose=verbose)
    change = result.relative_change
    say(f"‖ΔW‖/‖W‖: {'W is zero' if change is None else number(change)}")
    say(f"lost to rounding: {percent(result.lost_to_rounding)} of ΔW")
    if result.base_rounding is not None and result.base_rounding >= _MATTERS:
        say(f"the base's own rounding: ‖W − dq(q(W))‖ = {number(result.base_rounding)} ‖ΔW‖")
    if result.surviving is not None:
        share, error = percent(result.surviving), percent(result.quantising_error or 0.0)
        say(f"survives quantising: {share} of ΔW, with an error of {error}")
    converted = f", {result.converted} converted" if result.converted else ""
    say(
        f"size: {human_bytes(result.bytes_out)} in {quantity(len(result.files), 'file')}; "
        f"{quantity(len(result.tensors), 'tensor')} changed, {result.copied} copied{converted}"
    )
    if any(adapter.weight < 0 for adapter in result.adapters):
        note("a negative weight takes a change out up to rounding, not bit for bit")
    if result.left_out:
        note(f"not carried over: {', '.join(result.left_out)}")
