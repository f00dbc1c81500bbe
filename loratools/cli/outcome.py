"""What commands that write have in common: checking the output first, and how they end."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import click

from loratools.cli.errors import EXIT_FOUND
from loratools.cli.output import note, number
from loratools_formats.contract.files import check_output, check_target, read_adapter
from loratools_formats.contract.registry import get_format
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError, OutputExistsError


def read_source(
    path: Path,
    initial: Path | None,
    format_name: str | None,
    *,
    carry_unknown: bool,
    quiet: bool,
) -> tuple[Adapter, list[Adapter]]:
    """Return the adapter to work on, relative to its original base, and all it was read from."""
    adapter = read_adapter(path, format_name, carry_unknown=carry_unknown)
    if not quiet:
        for text in adapter.notes:
            note(text)
    if initial is None:
        return adapter, [adapter]
    from loratools.factors.initial import subtract_initial

    first = read_adapter(initial, format_name)
    return subtract_initial(adapter, first), [adapter, first]


def checked_target(
    output: Path | None,
    inputs: Iterable[Adapter],
    models: Iterable[Path | None] = (),
    *,
    overwrite: bool,
    dry_run: bool,
) -> Path | None:
    """Return where to write, None on a dry run, refusing early what could not be published.

    Args:
        output: where the user wants it.
        inputs: adapters, which may be replaced if the user says so.
        models: checkpoints that are read, which no adapter may replace.
        overwrite: whether an existing output may be replaced.
        dry_run: whether nothing is to be written.

    Raises:
        OptionError: no output was given.
        OutputExistsError: it exists and may not be replaced, it is a model that is read, or it lies
            inside or around an input.
    """
    if dry_run:
        return None
    if output is None:
        raise OptionError("no output given", hint="Add -o OUTPUT, or --dry-run")
    for adapter in inputs:
        check_output(adapter, output, overwrite=overwrite)
    for model in filter(None, models):
        check_target(output, [model], overwrite=overwrite)
        if os.path.realpath(output) == os.path.realpath(model):
            raise OutputExistsError(
                "the output is the model that is read",
                path=output,
                hint="Choose another output",
            )
    return output


def written_to(output: Path | None, base: Path, *, overwrite: bool, dry_run: bool) -> Path | None:
    """Return where to write a changed checkpoint, None on a dry run, refusing early as above.

    Raises:
        OptionError: no output was given.
        OutputExistsError: it exists and may not be replaced, or lies inside or around the base.
    """
    if dry_run:
        return None
    if output is None:
        raise OptionError("no output given", hint="Add -o OUTPUT, or --dry-run")
    check_target(output, [base], overwrite=overwrite)
    return output


def scratch_folder(target: Path | None) -> Path | None:
    """Return where results may wait: beside the output, which has to hold them anyway."""
    return None if target is None else Path(os.path.realpath(target)).parent


def planned_nbytes(adapter: Adapter) -> int:
    """Return the size of the weight file in the adapter's format."""
    return get_format(adapter.format).weights_nbytes(adapter)


def exceeds(error: float, limit: float | None) -> bool:
    """Return whether an error is above the user's limit."""
    return limit is not None and not error <= limit


def conclude(error: float, limit: float | None, target: Path | None, *, quiet: bool) -> int:
    """Say what was written or why nothing was, and return the exit code."""
    if exceeds(error, limit):
        click.echo(
            f"relative error {number(error)} is above --max-error {limit:g}; nothing was written",
            err=True,
        )
        return EXIT_FOUND
    if not quiet:
        note("dry run, nothing was written" if target is None else f"wrote {target}")
    return 0
