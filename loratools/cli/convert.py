"""`loratools convert`."""

from __future__ import annotations

from pathlib import Path

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.many import one_or_many
from loratools.cli.output import human_bytes, note, number, print_table, say
from loratools.cli.perform import perform, target_of
from loratools.face.convert import ConvertResult, convert
from loratools.operations.convert.options import ConvertOptions, SingleFileOptions
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Dropping

_SINGLE_FILES = ("names", "names_from", "component", "strip_training_metadata")


@named_command("convert")
@shared.takes(ConvertOptions, into="options")
@shared.takes(SingleFileOptions, *_SINGLE_FILES, into="single")
@shared.takes(Dropping, into="dropping")
@shared.reads("base", "from_", "carry_unknown", "ignore_key")
@shared.reports("json", "quiet", "verbose")
@one_or_many("in_place", "max_error")
def command(
    adapter: Path,
    writing: Writing,
    options: ConvertOptions,
    single: SingleFileOptions,
    dropping: Dropping,
    reading: Reading,
    reporting: Reporting,
) -> int:
    """Convert an adapter to another format, and check what was written.

    The output is read again, and its weight changes are compared with those of the input.

    \b
    loratools convert my-adapter -o my-adapter.gguf --base my-model
    loratools convert my-adapter.gguf -o my-adapter --base my-model
    """  # noqa: D301 - click reads the backspace
    target_of(writing)
    return perform(
        "check",
        lambda progress: convert(
            adapter,
            base=reading.base,
            options=options,
            single=single,
            dropping=dropping,
            reading=reading,
            writing=writing,
            progress=progress,
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        writing,
        reporting,
    )


def _show(result: ConvertResult, *, verbose: bool) -> None:
    for loss in result.losses:
        note(f"left out: {loss.name} {loss.reason}")
    for remedy in dict.fromkeys(loss.remedy for loss in result.losses if loss.remedy):
        note(remedy)
    if verbose:
        print_table(
            ["module", "rank", "relative error"],
            "<>>",
            [
                [module.name, _or_dash(module.rank), _or_dash(module.relative_error)]
                for module in result.modules
            ],
        )
    say(f"format: {result.from_} → {result.to}")
    say(f"modules: {len(result.modules)}")
    say(f"size: {human_bytes(result.bytes_out)}")
    if result.relative_error is not None:
        say(f"relative error of the written file: {number(result.relative_error)}")
        if result.other_error:
            say(f"largest error of its other tensors: {number(result.other_error)}")


def _or_dash(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else number(value)
