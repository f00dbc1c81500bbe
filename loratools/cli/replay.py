"""`loratools replay`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.exits import EXIT_FOUND
from loratools.cli.output import note, number, print_table, say
from loratools.cli.perform import report
from loratools.cli.progress import progress_bar
from loratools.operations.replayed import ReplayedFile
from loratools.pipeline.replay import Replaying, ReplayResult, replay
from loratools.work.requests import Reporting
from loratools_formats.disk.errors import printable


@named_command("replay")
@click.argument("path", type=shared.PATH)
@shared.takes(Replaying, into="how")
@shared.reports()
def command(path: Path, how: Replaying, reporting: Reporting) -> int:
    """Repeat the call that made an output, and compare the bytes.

    Inputs are found by their digests: below `--input`, where they were, or on the Hub. The exit
    code is 0 if all bytes are equal, 1 if some differ, and 3 if the call cannot be repeated.

    \b
    loratools replay both
    loratools replay both --input ~/adapters -o again
    """  # noqa: D301 - click reads the backspace
    with progress_bar("replay", quiet=reporting.quiet, unit="operation") as progress:
        found = replay(path, options=how, progress=progress)
    report(found, _show, reporting)
    if not reporting.quiet:
        _explain(found)
    return 0 if found.identical else EXIT_FOUND


def _show(found: ReplayResult) -> None:
    print_table(
        ["file", "made again"],
        "<<",
        [[printable(one.name), "equal" if one.identical else _apart(one)] for one in found.files],
    )
    verdict = "the bytes are equal" if found.identical else "the bytes differ"
    say(f"{' → '.join(map(printable, found.done))}: {verdict}")


def _apart(file: ReplayedFile) -> str:
    if None in (file.sha256, file.sha256_again):
        return "only there now" if file.sha256 is None else "not made again"
    if file.difference is None:
        return "different"
    if file.difference == 0:
        return "different metadata, equal tensors"
    return f"differs, most in {printable(file.tensor)}: by {number(file.difference)} of its norm"


def _explain(found: ReplayResult) -> None:
    for name in found.changed:
        note(f"{name} is not the file that the statement is about: it was changed since")
    for name in found.left_out:
        note(f"{name} names paths and is not compared")
    if found.identical:
        return
    if found.differences:
        note(f"this may be why: {'; '.join(found.differences)}")
    else:
        note("versions, BLAS and processor are those of the first time, and do not explain it")
