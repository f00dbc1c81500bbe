"""Turn an exception into one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import signal
import sys
import time
import warnings
from typing import TextIO

import click

from loratools.cli.exits import EXIT_ERROR, EXIT_UNCHECKED
from loratools.cli.failure import failure, is_json, is_reported
from loratools.cli.output import abandon, print_json, say, takes_more
from loratools.cli.signals import code_of, stop_on_signals

_PROGRAM = "loratools"
_COMPLETION = "_LORATOOLS_COMPLETE"
_STOPPED = ("interrupted", "terminated")


def run(cli: click.Command) -> None:
    """Run a command group and exit the process, with a code of `exits.MEANINGS`.

    Nothing but `--traceback` shows a Python traceback. Under `--json`, stdout gets an object for an
    error as well, unless a signal comes while a reader keeps the command waiting.
    """
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = _noted
    arrived = stop_on_signals()
    if "--traceback" in sys.argv[1:2]:
        sys.exit(_call(cli))
    began = time.perf_counter()
    try:
        code = _call(cli)
        _flush()
    except BrokenPipeError:  # help, which nobody reads to its end
        abandon(sys.stdout)
        code = 0
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - users get one line, whatever
        text, code = _told(error, arrived)
        try:
            _report(error, text, code, time.perf_counter() - began)
        except (OSError, KeyboardInterrupt):  # nobody reads, the disk is full, or Ctrl-C again
            abandon(sys.stdout)
    gc.freeze()  # or Python would look through everything for cycles on its way out
    sys.exit(code)


def _open_standard_streams() -> None:
    """Open those of stdin, stdout and stderr that the caller has closed, to nowhere.

    The first file that is opened would take such a number, and get what a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


def _report(error: BaseException, text: str, code: int, seconds: float) -> None:
    """Tell an error on stderr, and under `--json` on stdout, where a reader does not block it."""
    is_stopped = text in _STOPPED
    is_blocked = is_stopped and not takes_more()
    with contextlib.suppress(OSError):  # the terminal may be gone
        say(text if is_stopped else f"error: {text}", err=True)
    if is_blocked:
        abandon(sys.stdout)
    elif is_json(sys.argv[1:]) and not is_reported(error):
        print_json(failure(error, text, code, seconds))
    _flush()


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _told(error: BaseException, arrived: list[int]) -> tuple[str, int]:
    """Return the line for an error, and the exit code.

    If a signal arrived, it ended the run, whatever exception is seen here. The exception that a
    signal raises may be replaced by another that it caused, such as that of a half released lock.
    """
    if arrived or isinstance(error, KeyboardInterrupt | click.Abort):
        number = arrived[0] if arrived else signal.SIGINT
        return _STOPPED[number != signal.SIGINT], code_of(number)
    if isinstance(error, click.ClickException):
        return _usage(error), EXIT_ERROR
    return f"{describe(error)}{_about_folder()}", exit_code(error)


def _about_folder() -> str:
    """Return a sentence for those whose current folder is gone, where every path fails."""
    try:
        os.getcwd()
    except OSError:
        place = shlex.quote(os.environ.get("PWD") or "..")
        return f". The current folder is gone; enter it again, or another: cd {place}"
    return ""


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ends in an error of the library."""
    from loratools_formats.disk.errors import UncheckedError

    return EXIT_UNCHECKED if isinstance(error, UncheckedError) else EXIT_ERROR


def _noted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as commands show every note; a library has no other way to speak."""
    say(f"note: {message}", err=True)


def _call(cli: click.Command) -> int:
    """Run the group as its `main` would, which exits with 1 when the reader of stdout has gone."""
    if _COMPLETION in os.environ:
        from loratools.cli.shells import register

        register()
        cli.main(prog_name=_PROGRAM, complete_var=_COMPLETION)
    try:
        with cli.make_context(_PROGRAM, sys.argv[1:]) as context:
            result = cli.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return result if isinstance(result, int) else 0


def _usage(error: click.ClickException) -> str:
    """Return one line for an error in the command line itself."""
    text = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return text
    return f"{text}{'' if text.endswith('?') else '.'} See: {context.command_path} --help"


def describe(error: BaseException) -> str:
    """Return one line for an error: its own text if it is ours, its kind too if it is not."""
    from loratools.cli.wording import worded
    from loratools_formats.disk.errors import LoratoolsError, printable

    if isinstance(error, LoratoolsError):
        return worded(str(error))
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "the system starts no further thread. Raise its limit on processes: ulimit -u"
    if isinstance(error, OSError) and error.strerror:
        where = f"{printable(error.filename)}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    kind = type(error).__name__
    return (
        f"{kind}: {printable(error, 500)}. Run again with `loratools --traceback …` and report it"
    )
