"""`loratools fuse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.outcome import checked_target
from loratools.cli.output import (
    human_bytes,
    named,
    note,
    number,
    percent,
    print_json,
    print_table,
    progress_bar,
)
from loratools.cli.references import fuse_input, weighted_path
from loratools.operations.fuse.draft import FuseInput
from loratools.operations.fuse.gguf import GgufFuseOptions, GgufFusion, Outtype
from loratools.operations.fuse.operation import FuseOptions, FusePreview, FuseResult, Fusion
from loratools.operations.fuse.plan import TensorPlan
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.containers.gguf.container import is_gguf
from loratools_formats.containers.gguf.splits import read_model
from loratools_formats.disk.errors import OptionError


@named_command("fuse")
@shared.base_argument
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@shared.writes(positional=False)
@shared.takes(FuseOptions, into="options")
@shared.takes(GgufFuseOptions, "fallback", into="gguf")
@shared.reads("from_")
@shared.reports()
@click.pass_context
def command(
    context: click.Context,
    /,
    base: Path,
    adapters: tuple[str, ...],
    writing: Writing,
    options: FuseOptions,
    gguf: GgufFuseOptions,
    reading: Reading,
    reporting: Reporting,
) -> None:
    """Fuse adapters into base weights, streamed, without loading a model.

    BASE is a checkpoint folder, a safetensors file or a GGUF model. A weight follows an adapter's
    path after a colon and is 1 by default; -1 takes a fused adapter out again, up to rounding.

    \b
    loratools fuse base-model my-adapter -o merged-model
    loratools fuse base-model chat:0.7 code:0.3 -o both --dtype bf16
    loratools fuse base.gguf my-adapter -o merged.gguf --dtype q8_0
    """  # noqa: D301 - click reads the backspace
    output = checked_target(writing, [base, *(weighted_path(text)[0] for text in adapters)])
    inputs = [fuse_input(text, reading.from_) for text in adapters]
    fusion: Fusion | GgufFusion
    if is_gguf(base):
        _refuse(context, "max_shard_size", "base_mode", "requantize", kind="a GGUF model")
        fusion = GgufFusion(read_model(base), inputs, _for_gguf(options, gguf))
    else:
        _refuse(context, "fallback", kind="a safetensors checkpoint")
        fusion = Fusion(read_checkpoint(base), inputs, options)
    if output is None:
        _show_plan(fusion.preview, as_json=reporting.json, quiet=reporting.quiet)
        return
    with progress_bar("fuse", quiet=reporting.quiet, unit="B") as progress:
        result = fusion.write(output, overwrite=writing.overwrite, progress=progress)
    if reporting.json:
        print_json(_as_json(inputs, result))
    elif not reporting.quiet:
        _print_report(result)
    if not reporting.quiet:
        _notes(inputs, result, output)


def _for_gguf(options: FuseOptions, gguf: GgufFuseOptions) -> GgufFuseOptions:
    return replace(
        gguf,
        outtype=cast("Outtype", options.dtype or "keep"),
        workers=options.workers,
        device=options.device,
        allow_lossy=options.allow_lossy,
    )


def _refuse(context: click.Context, *names: str, kind: str) -> None:
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise OptionError(f"`{name}` has no meaning for {kind}")


def _notes(inputs: Sequence[FuseInput], result: FuseResult, output: Path) -> None:
    for text in result.notes:
        note(text)
    if any(item.weight < 0 for item in inputs):
        note("a negative weight takes a change out up to rounding, not bit for bit")
    if result.left_out:
        note(f"not carried over: {', '.join(result.left_out)}")
    note(f"wrote {output}")


def _sources(modules: Sequence[str], replaced_by: str | None) -> str:
    return ", ".join(modules) if modules else f"replaced by {replaced_by}"


def _show_plan(preview: FusePreview, *, as_json: bool, quiet: bool) -> None:
    touched, dtypes = preview.touched, preview.dtypes
    if as_json:
        print_json(
            {
                "operation": "fuse",
                "dry_run": True,
                "bytes_out": preview.nbytes,
                "tensors": [_plan_as_json(plan, dtypes[plan.key]) for plan in touched],
            }
        )
    elif not quiet:
        print_table(
            ["tensor", "shape", "dtype", "changed by"],
            "<<<<",
            [
                [
                    plan.key,
                    "×".join(map(str, plan.source.shape)),
                    dtypes[plan.key],
                    _sources(plan.modules, plan.replaced_by or "token rows"),
                ]
                for plan in touched
            ],
        )
        click.echo(f"tensors: {len(touched)} of {preview.total} change")
        click.echo(f"size: {human_bytes(preview.nbytes)} in {_count(preview.files, 'file')}")
    if not quiet:
        for text in preview.notes:
            note(text)
        note("dry run, nothing was written")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _plan_as_json(plan: TensorPlan, dtype: str) -> dict[str, object]:
    return {
        "name": plan.key,
        "shape": list(plan.source.shape),
        "dtype": dtype,
        "modules": list(plan.modules),
        "replaced_by": plan.replaced_by,
    }


def _as_json(inputs: Sequence[FuseInput], result: FuseResult) -> dict[str, object]:
    return {
        "operation": "fuse",
        "adapters": [{"name": item.name, "weight": item.weight} for item in inputs],
        "relative_change": result.relative_change,
        "lost_to_rounding": result.lost,
        "bytes_out": result.nbytes,
        "files": list(result.shards),
        "surviving": result.surviving,
        "copied": result.copied,
        "converted": result.converted,
        "left_out": list(result.left_out),
        "notes": list(result.notes),
        "tensors": [
            {
                **named(report),
                "relative_change": report.relative_change,
                "lost_to_rounding": report.lost,
            }
            for report in result.tensors
        ],
    }


def _print_report(result: FuseResult) -> None:
    header = ["tensor", "dtype", "‖ΔW‖/‖W‖", "lost to rounding"]
    rows = [
        [
            report.key,
            report.dtype,
            "new" if report.relative_change is None else number(report.relative_change),
            percent(report.lost),
        ]
        for report in result.tensors
    ]
    if result.surviving is not None:
        header.append("survives")
        for row, report in zip(rows, result.tensors, strict=True):
            row.append("–" if report.surviving is None else percent(report.surviving))
    print_table(header, "<<>>>"[: len(header)], rows)
    change = result.relative_change
    click.echo(f"‖ΔW‖/‖W‖: {'W is zero' if change is None else number(change)}")
    click.echo(f"lost to rounding: {percent(result.lost)} of ΔW")
    if result.surviving is not None:
        click.echo(f"survives quantising: {percent(result.surviving)} of ΔW")
    converted = f", {result.converted} converted" if result.converted else ""
    click.echo(
        f"size: {human_bytes(result.nbytes)} in {_count(len(result.shards), 'file')}; "
        f"{_count(len(result.tensors), 'tensor')} changed, {result.copied} copied{converted}"
    )
