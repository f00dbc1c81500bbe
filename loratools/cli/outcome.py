"""What commands that write have in common: checking the output first, and how they end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from loratools.cli.errors import EXIT_FOUND
from loratools.cli.output import note, number
from loratools.cli.wording import FLAGS, worded
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats.contract.registry import check_target, get_format, read_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError, OutputExistsError


def read_source(path: Path, reading: Reading, reporting: Reporting) -> Adapter:
    """Return the adapter to work on, relative to its original base."""
    adapter = read_adapter(path, reading.from_, carry_unknown=reading.carry_unknown)
    if not reporting.quiet:
        for text in adapter.notes:
            note(text)
    if reading.initial is None:
        return adapter
    from loratools.factors.initial import subtract_initial

    return subtract_initial(adapter, read_adapter(reading.initial, reading.from_))


def checked_target(writing: Writing, inputs: Iterable[Path | None]) -> Path | None:
    """Return where to write, None on a dry run, refusing early what could not be published.

    Args:
        writing: where the user wants the output, and how.
        inputs: every file and folder that is read; None stands for one that was not given.

    Raises:
        OptionError: no output was given.
        OutputExistsError: the output exists and may not be replaced, is an input, or lies inside an
            input or around one.
    """
    if writing.dry_run:
        return None
    output = writing.output
    if output is None:
        raise OptionError("no output given", hint="Add `output=PATH`, or `dry_run=True`")
    for path in filter(None, inputs):
        if os.path.realpath(output) == os.path.realpath(path) and not writing.in_place:
            raise OutputExistsError(
                "the output is an input, and inputs are never changed",
                path=output,
                hint="Choose another output"
                + (", or pass `in_place=True`" if "in_place" in FLAGS else ""),
            )
        check_target(output, [path], overwrite=writing.overwrite)
    return output


def scratch_folder(target: Path | None) -> Path | None:
    """Return where results may wait: beside the output, which has to hold them anyway."""
    return None if target is None else Path(os.path.realpath(target)).parent


def planned_nbytes(adapter: Adapter) -> int:
    """Return the size of the weights in the adapter's format; 0 if that is not known."""
    planned = get_format(adapter.format).weights_nbytes
    return 0 if planned is None else planned(adapter)


def show_how_to_choose(writing: Writing, reporting: Reporting, more: str = "") -> int:
    """Say how to go on from a table of choices, and return the exit code.

    Raises:
        OptionError: an output was given, and nothing decides its ranks.
    """
    rules = f"Choose with `rank`, `energy`, `budget` or another rule; see --help.{more}"
    if writing.output is not None:
        raise OptionError("no rule for the ranks, so nothing was written", hint=rules)
    if not (reporting.quiet or reporting.json):
        click.echo(worded(rules), err=True)
    return 0


def exceeds(error: float, limit: float | None) -> bool:
    """Return whether an error is above the user's limit."""
    return limit is not None and not error <= limit


def conclude(error: float, writing: Writing, target: Path | None, reporting: Reporting) -> int:
    """Say what was written or why nothing was, and return the exit code."""
    limit = writing.max_error
    if limit is not None and exceeds(error, limit):
        click.echo(
            f"relative error {number(error)} is above --max-error {limit:g}; nothing was written",
            err=True,
        )
        return EXIT_FOUND
    say_written(target, reporting)
    return 0


def say_written(target: Path | None, reporting: Reporting) -> None:
    """Say what was written."""
    if not reporting.quiet:
        note("dry run, nothing was written" if target is None else f"wrote {target}")
