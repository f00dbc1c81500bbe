"""One command over several adapters, in one process: `--out-dir` and its companions.

The command itself knows one adapter. It prints a line for each adapter, and lists failures at the
end.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from loratools.cli import options as shared
from loratools.cli.errors import describe, exit_code
from loratools.cli.exits import EXIT_FOUND
from loratools.cli.failure import failure
from loratools.cli.output import note, number, print_json_line, quantity, say, sizes
from loratools.cli.perform import collected
from loratools.cli.progress import progress_bar
from loratools.work.collection import adapters_in, check_apart, is_adapter, outputs_below
from loratools.work.declared import option
from loratools.work.requests import Reporting, Writing
from loratools_formats.disk.errors import (
    InexactError,
    LoratoolsError,
    OptionError,
    UnknownFormatError,
)
from loratools_formats.disk.publish import is_vacant


@dataclass(frozen=True)
class Several:
    """What to do with several adapters.

    Attributes:
        out_dir: write the result of each adapter into this folder, under the adapter's own name.
        keep_going: go on after an adapter that fails, and list those that did at the end.
        skip_existing: leave out adapters whose output exists.
    """

    out_dir: Path | None = option(None, heading="Output", metavar="DIR")
    keep_going: bool = option(False, heading="Output")
    skip_existing: bool = option(False, heading="Output")


@dataclass(frozen=True)
class _Failure:
    """Why an adapter failed: the line for people, and the JSON object."""

    text: str
    found: dict[str, Any]


def one_or_many(*names: str) -> shared.Decorator:
    """Let a command of one adapter take several; it stands below all other options.

    Args:
        names: options of writing, other than `--output`, `--overwrite` and `--dry-run`.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def command(
            *,
            adapters: tuple[Path, ...],
            writing: Writing,
            several: Several,
            reporting: Reporting,
            **others: Any,
        ) -> int:
            given = {"reporting": reporting, **others}
            if several.out_dir is not None:
                return _each(functools.partial(function, **given), adapters, writing, several)
            if several.keep_going or several.skip_existing:
                raise OptionError(
                    "`keep_going` and `skip_existing` are for several adapters",
                    hint="Add `out_dir=DIR`",
                )
            if not adapters:
                raise OptionError(
                    "no adapter given",
                    expected="ADAPTER [OUTPUT]",
                    hint="To see those below this folder: loratools info ./",
                )
            adapter, *places = adapters
            if len(places) > 1:
                hint = "Add `out_dir=DIR` to take each of them as an adapter"
                if not os.path.lexists(places[-1]):
                    last = shlex.quote(str(places[-1]))
                    hint = f"If {last} is where results go, write `out_dir={last}` in its place"
                number = next((one for one in places if str(one).isdecimal()), None)
                if number is not None and "rule" in others and not os.path.lexists(number):
                    hint = f"If {number} is a rank, write `rank={number}` in its place"
                raise OptionError(
                    f"{len(adapters)} paths are given", expected="ADAPTER [OUTPUT]", hint=hint
                )
            found = shared.placed(writing, adapter, places)
            try:
                return function(adapter=adapter, writing=found, **given)
            except UnknownFormatError as error:
                raise _of_several(adapter, found, error) from error

        taken = shared.takes(Several, into="several")(command)
        written = shared.takes(Writing, "output", "overwrite", "dry_run", *names, into="writing")
        argument = click.argument(
            "adapters", nargs=-1, type=shared.PATH, metavar="ADAPTER [OUTPUT]"
        )
        return argument(written(taken))

    return decorate


def _of_several(path: Path, writing: Writing, error: UnknownFormatError) -> UnknownFormatError:
    """Return the error of a folder that was given as an adapter, where it holds several."""
    from loratools_formats.contract.path_kinds import kind_of

    kind = kind_of(path)
    may_be_shelf = kind is None or kind.what.startswith("is a folder that holds")
    below = adapters_in([path]) if path.is_dir() and may_be_shelf else []
    inner = [one for one in below if is_adapter(one)]
    is_told = kind is not None and [one.parent for one in inner] == [path]
    if inner in ([], [path]) or is_told:
        return error
    first = shlex.quote(str(inner[0]))
    place = "Add `out_dir=DIR`"
    if writing.output is not None:
        place = f"Write `out_dir={shlex.quote(str(writing.output))}` in place of `output`"
    found = UnknownFormatError(
        f"is a folder that holds {quantity(len(inner), 'adapter')}",
        path=path,
        hint=f"Name it: {first}"
        if len(inner) == 1
        else f"{place} to take all of them, or name one, such as {first}",
    )
    found.ran = error.ran
    return found


def _each(
    function: Callable[..., int], paths: Sequence[Path], writing: Writing, several: Several
) -> int:
    """Run the command on every adapter; returns 1 if one failed."""
    given: dict[str, Any] = function.keywords  # type: ignore[attr-defined]
    reporting: Reporting = given["reporting"]
    outputs = _outputs_of(given, adapters_in(paths), writing, several)
    width = max((len(str(path)) for path in outputs), default=0)
    failed: dict[Path, _Failure] = {}
    wanted = outputs
    if several.skip_existing:
        wanted = {
            path: output
            for path, output in outputs.items()
            if not os.path.lexists(output) or is_vacant(output)
        }
    with progress_bar("adapters", quiet=reporting.quiet, unit="adapter") as progress:
        for done, (path, output) in enumerate(wanted.items(), 1):
            result, failed_as = _one(function, path, replace(writing, output=output), several)
            if failed_as is not None:
                failed[path] = failed_as
            if reporting.json:
                print_json_line(result.to_dict() if failed_as is None else failed_as.found)
            elif not reporting.quiet:
                _tell(str(path).ljust(width), result, failed_as)
            if progress is not None:
                progress(done, len(wanted))
    if not reporting.quiet:
        count = quantity(len(wanted) - len(failed), "adapter")
        skipped = len(outputs) - len(wanted)
        what = "would be written" if writing.dry_run else "written"
        note(f"{count} {what}, {skipped} skipped, {len(failed)} failed")
    for path, one in failed.items():
        say(f"failed: {path}: {one.text.removeprefix(f'{path}: ')}", err=True)
    return EXIT_FOUND if failed else 0


def _outputs_of(
    given: dict[str, Any], adapters: Sequence[Path], writing: Writing, several: Several
) -> dict[Path, Path]:
    """Return where each result goes, after a check that options fit several adapters."""
    if writing.output is not None or writing.in_place:
        raise OptionError("several outputs are given", expected="`out_dir` alone")
    if "pages" in given and given["pages"].files:
        raise OptionError("`html` and `plot` are for one adapter")
    assert several.out_dir is not None
    made = os.path.realpath(several.out_dir) + os.sep
    adapters = [path for path in adapters if not os.path.realpath(path).startswith(made)]
    outputs = outputs_below(several.out_dir, adapters, getattr(given.get("options"), "to", None))
    check_apart((output, path) for path, output in outputs.items())
    return outputs


def _one(
    function: Callable[..., int], path: Path, writing: Writing, several: Several
) -> tuple[Any, _Failure | None]:
    """Run the command on one adapter; returns its result, and how it failed if it did."""
    quiet = replace(function.keywords["reporting"], quiet=True, json=False)  # type: ignore[attr-defined]
    try:
        with collected() as results:
            code = function(adapter=path, writing=writing, reporting=quiet)
    except LoratoolsError as error:
        if not several.keep_going:
            raise
        return None, failed_with(error, path, writing.output)
    if code == 0:
        return results[-1], None
    text = f"above --max-error {writing.max_error:g}"
    limit = InexactError("the relative error is above the limit", result=results[-1])
    return results[-1], _Failure(text, failure(limit, text, code))


def failed_with(error: LoratoolsError, path: Path, output: Path | None = None) -> _Failure:
    """Return how one of several adapters failed."""
    text = describe(error)
    found = failure(error, text, exit_code(error))
    if error.ran is None:
        found |= {"inputs": [str(path)], "output": None if output is None else str(output)}
    return _Failure(text, found)


def _tell(name: str, result: Any, failed_as: _Failure | None) -> None:
    if failed_as is not None:
        say(f"{name}  failed")
        return
    error = getattr(result, "relative_error", None)
    before, after = (getattr(result, name, None) for name in ("bytes_in", "bytes_out"))
    parts = [] if error is None else [f"relative error {number(error)}"]
    if before and after is not None:
        parts.append(sizes(before, after))
    say(f"{name}  {'  '.join(parts) or 'done'}")
