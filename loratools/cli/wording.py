"""Parameters in messages of the library, worded as the flags of the command line.

The library writes a parameter as Python does, in backquotes: `overwrite=True`, `rank`. A command
line has `--overwrite` and `--rank` for them.
"""

from __future__ import annotations

import re

DOCS = "https://github.com/loratools/loratools/blob/main/docs"
"""Where the documentation can be read, by those who have no checkout too."""

FLAGS: dict[str, str] = {}
"""Flags by the names of options; each command adds its own when it is loaded."""


def read_on(page: str) -> str:
    """Return the lines of help that say where to read on, with the address whole on its own line.

    >>> read_on("commands/info.md").splitlines()[1]
    '  https://github.com/loratools/loratools/blob/main/docs/commands/info.md'

    Args:
        page: the path in the documentation.
    """
    return f"Learn more:\n  {DOCS}/{page}\n"


_PARAMETER = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


def worded(text: str) -> str:
    """Return a message with flags for the parameters that the command has.

    >>> FLAGS["max_rank"] = "--max-rank"
    >>> worded("Pass `max_rank=8`, not `max_rink`")
    'Pass --max-rank 8, not `max_rink`'
    """
    return _PARAMETER.sub(_flag, text)


def _flag(match: re.Match[str]) -> str:
    flag, value = FLAGS.get(match[1]), match[2]
    if flag is None:
        return match[0]
    return flag if value in (None, "True") else f"{flag} {value}"
