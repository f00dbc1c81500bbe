"""`loratools to-dora`."""

from __future__ import annotations

from pathlib import Path

from loratools.cli import options as shared
from loratools.cli.by_type import Column, print_modules
from loratools.cli.command import command as named_command
from loratools.cli.many import one_or_many
from loratools.cli.output import note, number, say
from loratools.cli.perform import perform, target_of
from loratools.face.to_dora import ToDoraResult, to_dora
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats.disk.errors import OptionError


@named_command("to-dora")
@shared.reads("base", "initial", "from_", "carry_unknown", "ignore_key")
@shared.takes(Workers, into="threads")
@shared.reports("json", "quiet", "verbose")
@one_or_many("in_place")
def command(
    adapter: Path, writing: Writing, reading: Reading, threads: Workers, reporting: Reporting
) -> int:
    """Turn a LoRA into a DoRA that makes the same change.

    The factors do not change. The magnitude of an output is the norm of its merged weight, so that
    the DoRA merges to the same weights, and training can go on from it.

    \b
    loratools to-dora my-lora --base model -o my-dora
    """  # noqa: D301 - click reads the backspace
    if reading.base is None:
        raise OptionError("magnitudes are norms of the base's weights", hint="Pass `base=MODEL`")
    target = target_of(writing)
    return perform(
        "to-dora",
        lambda progress: to_dora(
            adapter,
            base=reading.base,
            initial=reading.initial,
            threads=threads,
            reading=reading,
            writing=target,
            progress=progress,
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
    )


def _show(result: ToDoraResult, *, verbose: bool) -> None:
    modules = result.modules
    columns = [
        Column("rank", [module.rank for module in modules], str, summed=True),
        Column("outputs", [module.outputs for module in modules], str),
        Column("least magnitude", [module.least for module in modules], summed=True),
        Column("largest", [module.largest for module in modules], summed=True),
        Column("relative error", [module.relative_error for module in modules], summed=True),
    ]
    print_modules("module", [module.name for module in modules], columns, verbose=verbose)
    if result.relative_error is not None:
        say(f"relative error: {number(result.relative_error)}")
    note("magnitudes are rounded to float32; nothing else changes")
