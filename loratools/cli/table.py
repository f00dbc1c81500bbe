"""Aligned tables that fit the terminal.

A table that is too wide gets, one after the other until it fits: titles on several lines, words of
sentences on several lines, names shortened in the middle, and at last several blocks of columns
with the names at the left of each. Where the width is not known (a pipe, and no COLUMNS), nothing
is shortened.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

_GAP = 2
_SENTENCE = 3
"""A cell with this many spaces is a sentence, and is wrapped; others are shortened."""
_LEAST_NAME = 24
_LEAST_OTHER = 14
_ENDS = 3
_COMMAND = re.compile(r"(?<=[ :])`?loratools [a-z]+(-[a-z]+)? .*$")
_LEAST_SENTENCE = 24


def terminal_width() -> int | None:
    """Return the width to fit: COLUMNS if it is set, the terminal's, or None if there is none.

    The readline library sets COLUMNS and LINES in every process that loads it, such as Python's
    prompt, and children inherit them. Beside LINES, COLUMNS says nothing of a pipe.
    """
    if sys.stdout is not None and sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    given = os.environ.get("COLUMNS", "")
    is_meant = given.isdecimal() and int(given) > 0 and "LINES" not in os.environ
    return int(given) if is_meant else None


def shortened(text: str, width: int) -> str:
    """Return a name that fits, without a part of its middle if it is too long.

    Numbers and the last word stay, if the width allows: they tell one module from another.

    >>> shortened("model.layers.10.self_attn.q_proj", 24)
    'model.layers.10…n.q_proj'
    >>> shortened("model.layers.10.self_attn.q_proj", 30)
    'model.layers.10…lf_attn.q_proj'
    """
    if len(text) <= width:
        return text
    if width < _ENDS:
        return text[:width]
    drop = len(text) - width + 1
    leaf = max(text.rfind("."), text.rfind("/")) + 1
    middle = (len(text) - drop) / 2
    starts = sorted(range(1, len(text) - drop), key=lambda i: (abs(i - middle), i))
    for last in (leaf, len(text)):
        for i in starts:
            if i + drop <= last and not any(c.isdigit() for c in text[i : i + drop]):
                return f"{text[:i]}…{text[i + drop :]}"
    i = starts[0]
    return f"{text[:i]}…{text[i + drop :]}"


def wrapped(text: str, indent: str = "") -> str:
    """Return a line broken at words where the terminal ends; later lines begin with `indent`.

    A command at its end stays whole on a line of its own, so that it can be pasted.
    """
    width = terminal_width()
    if width is None or len(text) <= width:
        return text
    command = _COMMAND.search(text)
    prose = text if command is None else text[: command.start()].rstrip()
    lines = textwrap.wrap(
        prose,
        max(width, len(indent) + _LEAST_SENTENCE),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines if command is None else [*lines, f"{indent}{command[0]}"])


def table_lines(
    header: Sequence[str], align: str, rows: Sequence[Sequence[str]], width: int | None
) -> list[str]:
    """Return the lines of a table.

    Args:
        header: titles.
        align: `<` or `>` for each column.
        rows: cells.
        width: to fit; None if any will do.
    """
    columns = [[title, *(row[i] for row in rows)] for i, title in enumerate(header)]
    needed = [max(map(len, column)) for column in columns]
    if width is None or _total(needed) <= width:
        return _lines(columns, align, needed)
    names = [_LEAST_NAME] + [_LEAST_OTHER] * (len(columns) - 1)
    least = [*map(_least, columns, align, names)]
    lines: list[str] = []
    for block in _blocks(least, width):
        chosen = [columns[i] for i in block]
        sides = "".join(align[i] for i in block)
        widths = _fitted([needed[i] for i in block], [least[i] for i in block], width)
        lines += ([""] if lines else []) + _lines(chosen, sides, widths)
    return lines


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _least(column: Sequence[str], side: str, name: int) -> int:
    """Return how narrow a column may become: numbers and words of titles stay whole."""
    title, *cells = column
    words = max((len(word) for word in title.split()), default=0)
    longest = max(cells, key=len, default="")
    if side == ">":
        return max(words, len(longest))
    whole = len(longest)
    return max(words, min(whole, _LEAST_SENTENCE if _is_sentence(longest) else name))


def _is_sentence(cell: str) -> bool:
    return cell.count(" ") >= _SENTENCE and len(cell) > _LEAST_SENTENCE + _LEAST_NAME // 2


def _blocks(least: Sequence[int], width: int) -> list[list[int]]:
    """Return which columns stand beside each other; the first stands in each block."""
    blocks = [[0]]
    for i in range(1, len(least)):
        if len(blocks[-1]) > 1 and _total([least[j] for j in [*blocks[-1], i]]) > width:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


def _fitted(needed: list[int], least: list[int], width: int) -> list[int]:
    """Return widths that fit, taken from the widest columns first."""
    widths = list(needed)
    while _total(widths) > width:
        spare = [i for i in range(len(widths)) if widths[i] > least[i]]
        if not spare:
            break
        widths[max(spare, key=lambda i: widths[i])] -= 1
    return widths


def _lines(columns: Sequence[Sequence[str]], align: str, widths: Sequence[int]) -> list[str]:
    cells = [
        [_cell(text, size, is_title=not place) for place, text in enumerate(column)]
        for column, size in zip(columns, widths, strict=True)
    ]
    lines = []
    for place in range(len(columns[0])):
        row = [column[place] for column in cells]
        height = max(map(len, row))
        padded = [
            [""] * (height - len(cell)) + cell if place == 0 else cell + [""] * (height - len(cell))
            for cell in row
        ]
        for parts in zip(*padded, strict=True):
            shown = zip(parts, align, widths, strict=True)
            text = (" " * _GAP).join(f"{part:{side}{size}}" for part, side, size in shown)
            lines.append(text.rstrip())
    return lines


def _cell(text: str, width: int, *, is_title: bool) -> list[str]:
    if len(text) <= width:
        return [text]
    if is_title or _is_sentence(text):
        words = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
        return [shortened(word, width) for word in words]
    return [shortened(text, width)]
