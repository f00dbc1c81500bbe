"""What every command does around the function that it calls: run it, and report the result.

Text and `--json` come from the same result; notes and errors go to stderr.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, TypeVar

from loratools.cli.errors import describe
from loratools.cli.exits import EXIT_ERROR, EXIT_FOUND
from loratools.cli.failure import error_fields, mark_reported
from loratools.cli.output import note, number, print_choices, print_json, say
from loratools.cli.pages import Pages, after
from loratools.cli.progress import progress_bar
from loratools.cli.wording import worded
from loratools.face.result import Result
from loratools.work.requests import Progress, Reporting, Writing
from loratools_formats.disk.errors import (
    InexactError,
    LoratoolsError,
    LossyError,
    OptionError,
    ResultError,
)

Found = TypeVar("Found", bound=Result)
_NONE = Pages()


def target_of(writing: Writing, last: str | None = None) -> Writing:
    """Return where the result goes: nowhere on a dry run.

    Args:
        writing: what was asked for.
        last: the last adapter that was named, which may have been meant as the output.

    Raises:
        OptionError: no output was given.
    """
    if writing.dry_run:
        return replace(writing, output=None, in_place=False)
    if writing.output is None:
        hint = "Add `output=PATH`, or `dry_run=True`"
        if last is not None and _may_be_output(last):
            hint = f"If {last} is the output, write `output={last}` in its place"
        raise OptionError("no output given", hint=hint)
    return writing


def _may_be_output(text: str) -> bool:
    """Return whether a path could be an output: it does not exist, and its folder does."""
    return not os.path.lexists(text) and os.path.isdir(os.path.dirname(text) or ".")


def require_adapters(adapters: Sequence[object], command: str) -> None:
    """Refuse a command over adapters without any.

    Raises:
        OptionError: there is none.
    """
    if not adapters:
        raise OptionError(
            "no adapter given",
            expected="ADAPTER...",
            hint=f"All below this folder: loratools {command} ./",
        )


_COLLECTED: ContextVar[list[Result] | None] = ContextVar("collected", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[Result]]:
    """Keep results in the list that this yields, instead of printing them."""
    results: list[Result] = []
    token = _COLLECTED.set(results)
    try:
        yield results
    finally:
        _COLLECTED.reset(token)


def report(
    result: Found,
    show: Callable[[Found], None],
    reporting: Reporting,
    error: LoratoolsError | None = None,
    code: int = EXIT_ERROR,
) -> None:
    """Print a result: as one JSON object, or as text with its notes.

    Args:
        result: what to print.
        show: prints it as text.
        reporting: how to print.
        error: what the command ends in, all the same; it is part of the object.
        code: the exit code for that error.
    """
    results = _COLLECTED.get()
    if results is not None:
        results.append(result)
        return
    if reporting.json:
        print_json(result.to_dict() if error is None else _with_error(result, error, code))
    elif not reporting.quiet:
        show(result)
    if not reporting.quiet:
        for text in getattr(result, "notes", ()):
            note(text)


def _with_error(result: Result, error: LoratoolsError, code: int) -> dict[str, Any]:
    mark_reported(error)
    return {**result.to_dict(), "error": error_fields(error, describe(error), code)}


def perform(
    label: str,
    work: Callable[[Progress | None], Found],
    show: Callable[[Found], None],
    writing: Writing,
    reporting: Reporting,
    unit: str = "module",
    pages: Pages = _NONE,
) -> int:
    """Run an operation, report its result, and return the exit code.

    Args:
        label: of the progress bar.
        work: runs it; called with what draws progress.
        show: prints the result as text.
        writing: where the result goes.
        reporting: how to print.
        unit: what progress counts.
        pages: other forms of the report, checked already.

    Raises:
        LoratoolsError: the operation failed.
    """
    failed: ResultError | None = None
    result: Any
    try:
        with progress_bar(label, quiet=reporting.quiet, unit=unit) as progress:
            result = work(progress)
    except ResultError as error:
        if isinstance(error, LossyError) and not writing.dry_run:
            raise
        failed, result = error, error.result
    is_limit = isinstance(failed, InexactError) and writing.max_error is not None
    code = EXIT_FOUND if is_limit else EXIT_ERROR
    report(result, show, reporting, failed, code)
    if is_limit:
        say(
            f"relative error {number(result.relative_error)} is above --max-error "
            f"{writing.max_error:g}; nothing was written",
            err=True,
        )
        return code
    if failed is not None:
        raise failed
    with after(None if writing.dry_run else writing.output):
        pages.write(result, overwrite=writing.overwrite)
    if not reporting.quiet:
        nothing = writing.dry_run or writing.output is None
        nothing_else = "nothing else" if pages.files else "nothing"
        done = getattr(result, "published", None)
        wrote = f"wrote {writing.output}" if done is None else f"published {done.url}"
        note(f"dry run, {nothing_else} was written" if nothing else wrote)
    pages.say(reporting)
    return 0


def show_choices(
    choices: Any,
    writing: Writing,
    reporting: Reporting,
    more: str = "",
    text: str | None = None,
    pages: Pages = _NONE,
) -> int:
    """Print the table rank → size → error, say how to go on, and return the exit code.

    Args:
        choices: a result with `choices`, and `bytes_in` if sizes are to be compared with it.
        writing: where the result was to go.
        reporting: how to print.
        more: another way out than to choose a rank.
        text: a line below the table.
        pages: other forms of the table, checked already.

    Raises:
        OptionError: an output was given, and nothing decides its ranks.
    """

    def show(found: Any) -> None:
        print_choices(getattr(found, "bytes_in", None), found.choices)
        if text is not None:
            say(text)

    if writing.output is None:
        pages.write(choices, overwrite=writing.overwrite)
    rules = f"Choose with `rank`, `energy`, `budget` or another rule; see --help.{more}"
    error: OptionError | None = None
    if writing.output is not None:
        error = OptionError("no rule for the ranks, so nothing was written", hint=rules)
    report(choices, show, reporting, error)
    if error is not None:
        raise error
    if not (reporting.quiet or reporting.json):
        say(worded(rules), err=True)
    pages.say(reporting)
    return 0
