"""`loratools to-dora`."""

from __future__ import annotations

from pathlib import Path

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.outcome import checked_target, conclude, read_source
from loratools.cli.output import note, number, print_json, print_table, progress_bar
from loratools.operations.to_dora import ToDoraResult, to_dora
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats import write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import OptionError


@named_command("to-dora")
@shared.adapter_argument
@shared.writes("in_place")
@shared.reads("base", "initial", "from_", "carry_unknown")
@shared.takes(Workers, into="threads")
@shared.reports()
def command(
    adapter: Path, writing: Writing, reading: Reading, threads: Workers, reporting: Reporting
) -> int:
    """Turn a LoRA into a DoRA that makes the same change.

    The factors stay as they are, and every output gets the norm of its weight with the change as
    magnitude, so that the DoRA merges to the same weights and training can go on from it.

    \b
    loratools to-dora my-lora --base model -o my-dora
    """  # noqa: D301 - click reads the backspace
    if reading.base is None:
        raise OptionError("magnitudes are norms of the base's weights", hint="Pass `base=MODEL`")
    source = read_source(adapter, reading, reporting)
    target = checked_target(writing, [adapter, reading.initial, reading.base])
    with progress_bar("to-dora", quiet=reporting.quiet) as progress:
        base = read_checkpoint(reading.base)
        result = to_dora(source, base, workers=threads.workers, progress=progress)
    if target is not None:
        write_adapter(result.adapter, target, source.format, overwrite=writing.overwrite)
    if reporting.json:
        print_json(_as_json(result))
    elif not reporting.quiet:
        _print_report(result)
    if not reporting.quiet:
        note("magnitudes are rounded to float32; nothing else changes")
    return conclude(0.0, writing, target, reporting)


def _as_json(result: ToDoraResult) -> dict[str, object]:
    return {
        "operation": "to-dora",
        "modules": [
            {
                "name": module.name,
                "rank": module.rank,
                "outputs": module.outputs,
                "least": module.least,
                "largest": module.largest,
            }
            for module in result.modules
        ],
    }


def _print_report(result: ToDoraResult) -> None:
    print_table(
        ["module", "rank", "outputs", "least magnitude", "largest"],
        "<>>>>",
        [
            [
                module.name,
                str(module.rank),
                str(module.outputs),
                number(module.least),
                number(module.largest),
            ]
            for module in result.modules
        ],
    )
