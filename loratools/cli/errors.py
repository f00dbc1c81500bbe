"""From exceptions to one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from typing import TextIO

import click

EXIT_FOUND = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_ENDING = ("SIGTERM", "SIGHUP")
_PROGRAM = "loratools"
_COMPLETION = "_LORATOOLS_COMPLETE"


def run(cli: click.Command) -> None:
    """Run a command group and exit the process.

    Exit codes: what the command returned, 2 for usage or bad input, 130 when interrupted. Nothing
    but `--traceback` shows a Python traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = _noted
    _end_as_exceptions_do()
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
        click.echo("interrupted", err=True)
        code = EXIT_INTERRUPTED
    except _EndedError as end:
        click.echo("interrupted", err=True)
        code = 128 + end.number
    except click.ClickException as error:
        click.echo(f"error: {_usage(error)}", err=True)
        code = EXIT_ERROR
    except Exception as error:  # noqa: BLE001 - users get one line, whatever happened
        click.echo(f"error: {describe(error)}", err=True)
        code = EXIT_ERROR
    sys.exit(code)


def _end_as_exceptions_do() -> None:
    """Have signals raise that would end the process, unless it was started to ignore them."""
    numbers = (getattr(signal, name, None) for name in _ENDING)
    for number in numbers:
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    """End as an exception does, so that temporaries are removed; a second signal kills."""
    del frame
    signal.signal(number, signal.SIG_DFL)
    raise _EndedError(number)


class _EndedError(BaseException):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _noted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as commands show every note; a library has no other way to speak."""
    click.echo(f"note: {message}", err=True)


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
