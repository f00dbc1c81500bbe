"""`loratools extract`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.by_type import Column, print_modules
from loratools.cli.command import command as named_command
from loratools.cli.output import human_bytes, note, number, percent, quantity, say
from loratools.cli.pages import Pages
from loratools.cli.perform import perform, show_choices, target_of
from loratools.face.extract import ExtractResult, extract, extract_choices
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.extract.operation import Naming
from loratools.work.requests import Reporting, Writing
from loratools.work.selection import Selection


@named_command("extract")
@shared.base_argument
@click.argument("tuned", type=shared.PATH)
@shared.writes("max_error")
@shared.takes(Naming, into="naming")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute")
@shared.takes(Selection, into="selection")
@shared.takes(Pages, "html", "plot", into="pages")
@shared.reports("json", "quiet", "verbose")
def command(
    base: Path,
    tuned: Path,
    writing: Writing,
    naming: Naming,
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
    pages: Pages,
    reporting: Reporting,
) -> int:
    """Extract the LoRA between two checkpoints.

    BASE and TUNED are checkpoint folders or safetensors files of one model, before and after
    training. Without a rule for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools extract base-model tuned-model -o my-lora --rank 32
    loratools extract sdxl tuned-sdxl -o x.safetensors --to kohya --rank 32
    """  # noqa: D301 - click reads the backspace
    pages.check(reporting, [base, tuned, writing.output], overwrite=writing.overwrite)
    if not rule.is_given:
        choices = extract_choices(base, tuned, naming=naming, compute=compute, selection=selection)
        return show_choices(choices, writing, reporting, pages=pages)
    target = target_of(writing)
    return perform(
        "extract",
        lambda progress: extract(
            base,
            tuned,
            naming=naming,
            rule=rule,
            compute=compute,
            selection=selection,
            writing=target,
            progress=progress,
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
        pages=pages,
    )


def _show(result: ExtractResult, *, verbose: bool) -> None:
    modules = result.modules
    errors = [module.relative_error for module in modules]
    columns = [
        Column("rank", [module.rank for module in modules], str, summed=True),
        Column("energy kept", [module.energy for module in modules], percent),
        Column("relative error", errors, summed=True),
    ]
    names = [module.name for module in modules]
    print_modules("module", names, columns, errors, verbose=verbose)
    for name in result.replaced:
        say(f"carried whole: {name}")
    say(f"unchanged: {quantity(result.unchanged, 'tensor')}")
    say(f"relative error: {number(result.relative_error)}")
    say(f"size: {human_bytes(result.bytes_out)}")
    if result.skipped:
        note(f"changed but not selected: {', '.join(result.skipped)}")
