"""From exceptions to one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from typing import TextIO

import click

from loratools.cli.output import say

EXIT_FOUND = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
_EXIT_SIGNAL = 128

_PROGRAM = "loratools"
_COMPLETION = "_LORATOOLS_COMPLETE"


def run(cli: click.Command) -> None:
    """Run a command group and exit the process.

    Exit codes: what the command returned, 2 for usage or bad input, 130 when interrupted, 128 and
    the signal's number when terminated or hung up. Nothing but `--traceback` shows a Python
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = _noted
    arrived = _stop_on_signals()
    if "--traceback" in sys.argv[1:2]:
        sys.exit(_call(cli))
    try:
        code = _call(cli)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone; keep Python from complaining about it while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (KeyboardInterrupt, click.Abort):
        code = _interrupted(arrived)
    except click.ClickException as error:
        say(f"error: {_usage(error)}", err=True)
        code = EXIT_ERROR
    except Exception as error:  # noqa: BLE001 - users get one line, whatever happened
        if arrived:
            code = _interrupted(arrived)
        else:
            say(f"error: {describe(error)}", err=True)
            code = EXIT_ERROR
    sys.exit(code)


def _interrupted(arrived: list[int]) -> int:
    """Say that a signal ended the run, and return the exit code.

    An exception that is raised anywhere may be replaced on its way by one that it caused, such as
    that of a lock which it found half released.
    """
    number = arrived[0] if arrived else signal.SIGINT
    with contextlib.suppress(OSError):  # the terminal may be gone
        say("interrupted" if number == signal.SIGINT else "terminated", err=True)
    return EXIT_INTERRUPTED if number == signal.SIGINT else _EXIT_SIGNAL + number


def _stop_on_signals() -> list[int]:
    """Let signals unwind the stack, so that outputs are cleared away; return those that arrived.

    SIGTERM and SIGHUP do as Ctrl-C, unless whoever started this process ignores them.
    """
    arrived: list[int] = []

    def stop(number: int, frame: object) -> None:
        arrived.append(number)
        raise KeyboardInterrupt

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        usual = (signal.SIG_DFL, signal.default_int_handler)
        if number is not None and signal.getsignal(number) in usual:
            signal.signal(number, stop)
    return arrived


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
    if isinstance(error, OSError) and error.strerror:
        where = f"{printable(error.filename)}: " if error.filename is not None else ""
        return f"{where}{error.strerror}"
    kind = type(error).__name__
    return (
        f"{kind}: {printable(error, 500)}. Run again with `loratools --traceback …` and report it"
    )
