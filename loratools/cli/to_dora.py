"""`loratools to-dora`."""

from __future__ import annotations

from pathlib import Path

from loratools.cli import options as shared
from loratools.cli.by_type import Measure, ModuleTable, print_modules
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
    rows = [
        [
            module.name,
            str(module.rank),
            str(module.outputs),
            number(module.least),
            number(module.largest),
            "–" if module.relative_error is None else number(module.relative_error),
        ]
        for module in modules
    ]
    measures = {
        "rank": Measure([module.rank for module in modules], str),
        "least magnitude": Measure([module.least for module in modules]),
        "largest": Measure([module.largest for module in modules]),
        "relative error": Measure([module.relative_error for module in modules]),
    }
    header = ["module", "rank", "outputs", "least magnitude", "largest", "relative error"]
    print_modules(ModuleTable(header, "<>>>>>", rows, measures), verbose=verbose)
    if result.relative_error is not None:
        say(f"relative error: {number(result.relative_error)}")
    note("magnitudes are rounded to float32; nothing else changes")
