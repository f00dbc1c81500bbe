"""Rendering: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import re
import select
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from loratools.cli.plain_text import spelled
from loratools.cli.table import table_lines, terminal_width, wrapped
from loratools.cli.wording import worded
from loratools_formats.disk.errors import printable

if TYPE_CHECKING:
    from loratools.face.choices import ChoiceRow

_UNSAFE = re.compile(r"[^ -~\n]")
_MARGIN = re.compile(r"[ │├└─|`-]*")
_BRANCHES = str.maketrans("├└─`-", "│    ")
"""What continues the margin of a tree below a line."""
_is_cut = False
"""Whether a write to stdout has begun and not ended."""

_NOT_ASCII = re.compile(r"[^\x00-\x7e]")


def say(text: str = "", *, err: bool = False, nl: bool = True, whole: bool = False) -> None:
    r"""Print text, with everything escaped that a terminal would obey or show out of order.

    Every word that commands print goes through here, or through `print_json_text`. A sentence on
    stdout is broken where the terminal ends. Messages on stderr are one line each, which the
    terminal breaks: what they say to type can be copied.

    Args:
        text: to print.
        err: print on stderr.
        nl: end the line.
        whole: keep the line whole, as other programs read it.
    """
    shown = spelled(_UNSAFE.sub(lambda found: _escaped(found[0]), text))
    if not (err or whole) and nl and "\n" not in shown:
        margin = _MARGIN.match(shown)[0]  # type: ignore[index]
        shown = wrapped(shown, f"{margin.translate(_BRANCHES)}  ")
    _write(shown, err=err, nl=nl)


def _write(text: str, *, err: bool = False, nl: bool = True) -> None:
    global _is_cut  # noqa: PLW0603 - a process has one stdout
    _is_cut = not err
    try:
        click.echo(text, err=err, nl=nl)
    except BrokenPipeError:
        abandon(sys.stderr if err else sys.stdout)
    _is_cut = False


def abandon(stream: TextIO | None) -> None:
    """Send to nowhere what is printed from now on, since the reader of a stream has gone.

    The work goes on: `| head` shortens what is shown, and neither outputs nor the exit code.
    """
    if stream is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def takes_more() -> bool:
    """Return whether stdout ends in something whole, and is read by somebody who keeps up.

    A signal may end a command while it waits for a slow reader, with half an object written.
    """
    if _is_cut or sys.stdout is None:
        return False
    try:
        return bool(select.select([], [sys.stdout], [], 0)[1])
    except (OSError, ValueError):  # Windows asks sockets only; a stream of a test has no number
        return True


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object."""
    print_json_text(json.dumps(result, ensure_ascii=False, allow_nan=False, indent=2))


def print_json_line(result: dict[str, Any]) -> None:
    """Print one JSON object on one line, as one of several."""
    print_json_text(json.dumps(result, ensure_ascii=False, allow_nan=False))


def print_json_text(text: str) -> None:
    """Print JSON, with JSON's escapes for what a terminal would obey, or stdout cannot encode.

    Names that are no UTF-8 keep their bytes as lone surrogates, as Python has them.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

    def written(found: re.Match[str]) -> str:
        try:
            found[0].encode(encoding)
        except UnicodeEncodeError:
            return json.dumps(found[0])[1:-1]
        return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]

    _write(_NOT_ASCII.sub(written, text))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def quantity(count: int, unit: str) -> str:
    """Return a number of things.

    >>> quantity(1, "key"), quantity(2, "key")
    ('1 key', '2 keys')
    """
    return f"{count} {unit}" if count == 1 else f"{count} {unit}s"


def print_table(header: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns that fit the terminal.

    Args:
        header: titles.
        align: `<` or `>` for each column.
        rows: cells.
    """
    titles, cells = [spelled(title) for title in header], [[*map(_shown, row)] for row in rows]
    for line in table_lines(titles, align, cells, terminal_width()):
        say(line, whole=True)


def _shown(cell: str) -> str:
    """Return a cell as it will be printed, so that its width is known."""
    return spelled(_UNSAFE.sub(lambda found: _escaped(found[0]), cell))


def print_choices(bytes_in: int | None, choices: Sequence[ChoiceRow]) -> None:
    """Print the table rank → size → error; sizes are compared with `bytes_in`, if there is any."""
    rows = [
        [
            str(choice.rank),
            human_bytes(choice.bytes),
            percent(choice.bytes / (bytes_in or 1)),
            percent(choice.energy),
            number(choice.relative_error),
        ]
        for choice in choices
    ]
    header = ["rank", "size", "of input", "energy kept", "relative error"]
    if bytes_in is None:
        header, rows = [*header[:2], *header[3:]], [[*row[:2], *row[3:]] for row in rows]
    print_table(header, ">" * len(header), rows)


def number(value: float) -> str:
    """Return an error or a ratio with three significant digits.

    >>> number(0.48712), number(3.21e-8), number(0.0)
    ('0.487', '3.21e-08', '0')
    """
    return f"{value:.3g}"


def note(text: str) -> None:
    """Print a remark on stderr."""
    say(f"note: {worded(printable(text, 1000))}", err=True)


def human_bytes(count: int) -> str:
    """Return a size in decimal units.

    >>> human_bytes(999), human_bytes(1_234_567)
    ('999 B', '1.2 MB')
    """
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 1000 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def sizes(before: int, after: int) -> str:
    """Return two sizes and their ratio.

    >>> sizes(2000, 500)
    '2.0 kB → 500 B (25.00%)'
    """
    return f"{human_bytes(before)} → {human_bytes(after)} ({percent(after / before)})"


def percent(share: float) -> str:
    """Return a share as a percentage with two decimals.

    >>> percent(0.98765)
    '98.77%'
    """
    return f"{100 * share:.2f}%"
