"""TOML parsing for files from strangers: what Python's parser takes for ever over is refused.

`tomllib` recurses once for each level, takes quadratic time over keys of many parts, and converts
integers of any length. One linear look at the text, strings and comments left out, finds all three.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

MAX_INTEGER_DIGITS = 20
_MOST_LEVELS = 32
_MOST_PARTS = 16
_STRING_OR_COMMENT = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*+"""|'
    r"'''(?:[^']|'(?!''))*+'''|"
    r'"(?:[^"\\\n]|\\.)*+"|'
    r"'[^'\n]*+'|"
    r"#[^\n]*+",
    re.DOTALL,
)
_NUMBER = re.compile(r"(?<![\w.-])[+-]?(?:0[xX][0-9a-fA-F_]++|0[oO][0-7_]++|0[bB][01_]++|[\d_]++)")
_KEY = re.compile(rf"(?:[\w-]++[ \t]*+\.[ \t]*+){{{_MOST_PARTS}}}")


class StrictTomlError(ValueError):
    """The text is not TOML, or not TOML that is parsed in reasonable time."""


def loads(data: bytes) -> dict[str, Any]:
    """Parse TOML.

    Raises:
        StrictTomlError: not UTF-8, integers over 20 digits, keys of many parts, nesting too deep,
            or no TOML.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictTomlError(f"not UTF-8 at byte {error.start}") from error
    _refuse_excess(text)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError, OverflowError) as error:
        raise StrictTomlError(str(error)[:200]) from error


def _refuse_excess(text: str) -> None:
    bare = _STRING_OR_COMMENT.sub(lambda found: "" if found[0].startswith("#") else "s", text)
    for number in _NUMBER.finditer(bare):
        if len(number[0].replace("_", "").lstrip("+-")) > MAX_INTEGER_DIGITS + 2:
            raise StrictTomlError(f"a number of {len(number[0])} digits")
    if found := _KEY.search(bare):
        raise StrictTomlError(f"a key of more than {_MOST_PARTS} parts: {found[0][:40]}")
    level = 0
    for mark in re.finditer(r"[\[{\]}]", bare):
        level += 1 if mark[0] in "[{" else -1
        if level > _MOST_LEVELS:
            raise StrictTomlError("nested too deeply")
