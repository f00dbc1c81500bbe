"""`loratools to-dora`."""

from __future__ import annotations

from pathlib import Path

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import note, number, print_table
from loratools.cli.perform import perform, target_of
from loratools.face.to_dora import ToDoraResult, to_dora
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats.disk.errors import OptionError


@named_command("to-dora")
@shared.adapter_argument
@shared.writes("in_place")
@shared.reads("base", "initial", "from_", "carry_unknown", "ignore_key")
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
        _show,
        target,
        reporting,
    )


def _show(result: ToDoraResult) -> None:
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
    note("magnitudes are rounded to float32; nothing else changes")
