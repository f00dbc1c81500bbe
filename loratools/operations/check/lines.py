"""The line of a text file that a finding stands in.

Only files that people edit have lines: adapter_config.json and README.md. A key of the
configuration is looked for at the top level, a key of the model card in its front matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from loratools_formats.disk.errors import LoratoolsError
from loratools_formats.disk.files import inside, read_small_file

_MAX_BYTES = 1 << 20
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\]]')
_AT_CHARACTER = re.compile(r"at character (\d+)")
_IN_LINE = re.compile(r"in line (\d+)")


def line_of(folder: Path, file: str, keys: Sequence[str], message: str) -> int | None:
    """Return the line, from 1; None for files without lines, 1 if nothing tells a line.

    Args:
        folder: of the adapter.
        file: its name there.
        keys: that the finding is about, the likeliest first.
        message: of a parser, which may name the place itself.
    """
    if not file.endswith((".json", ".md")):
        return None
    try:
        text = read_small_file(inside(folder, file), _MAX_BYTES).decode(errors="replace")
    except LoratoolsError:  # not there, too long, or no regular file: then it has no lines either
        return None
    lines = _lines_of_card(text) if file.endswith(".md") else _lines_of_json(text)
    known = dict(reversed(list(lines)))
    at_character, in_line = _AT_CHARACTER.search(message), _IN_LINE.search(message)
    if at_character is not None:
        return 1 + text.count("\n", 0, int(at_character[1]))
    if in_line is not None:
        return 1 + int(in_line[1])  # the front matter begins with the second line
    words = re.findall(r"\w+", message)
    return next((known[key] for key in (*keys, *words) if key in known), 1)


def _lines_of_json(text: str) -> Iterator[tuple[str, int]]:
    r"""Yield the keys of the outermost object, each with its line.

    >>> list(_lines_of_json('{\n "r": 8,\n "x": {"r": 1}\n}'))
    [('r', 2), ('x', 3)]
    """
    depth, line, done = 0, 1, 0
    for token in _TOKEN.finditer(text):
        if token[0] in ("{", "["):
            depth += 1
        elif token[0] in ("}", "]"):
            depth -= 1
        elif depth == 1 and token[2]:
            line, done = line + text.count("\n", done, token.start()), token.start()
            yield token[1], line


def _lines_of_card(text: str) -> Iterator[tuple[str, int]]:
    r"""Yield the keys of a model card's front matter, each with its line.

    >>> list(_lines_of_card("---\nlicense: mit\ntags:\n- lora\n---\nlicense: no"))
    [('license', 2), ('tags', 3)]
    """
    lines = text.splitlines()
    if lines[:1] != ["---"]:
        return
    for number, line in enumerate(lines[1:], start=2):
        if line.startswith("---"):
            return
        key, colon, _ = line.partition(":")
        if colon and key and not key[0].isspace():
            yield key, number
