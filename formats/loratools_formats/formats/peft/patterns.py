"""`rank_pattern` and `alpha_pattern`: matching as PEFT does; `core.peft_patterns` writes them.

Source: `get_pattern_key` in peft/utils/other.py, 0.21.2. The keys are regular expressions from a
file somebody else made, and Python's engine can be made to run for ever, so anything but a plain
name is matched in a child process that may use so much CPU time; the clock does not count, so that
a busy machine refuses nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from loratools_formats.core.peft_patterns import blanked
from loratools_formats.disk.errors import AdapterError

Value = TypeVar("Value", int, float)

_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])+\Z")
_MAX_PATTERN_CHARACTERS = 512
_MAX_PATTERNS = 100_000
_MAX_LOOK_UPS = 8_000_000
_CPU_SECONDS = 1
_TIMEOUT_SECONDS = 120.0  # of the clock, for systems that do not count CPU time

_CHILD = f"""
import json, re, signal, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, ({_CPU_SECONDS}, {_CPU_SECONDS}))
except ImportError:  # Windows
    pass
getattr(signal, "alarm", int)({_TIMEOUT_SECONDS:.0f})  # in case nobody stops this
patterns, names = json.load(sys.stdin)
try:
    compiled = [re.compile(p) for p in patterns]
except (re.error, OverflowError, RecursionError) as error:
    sys.exit(f"{{error}}")
print(json.dumps([next((i for i, c in enumerate(compiled) if c.match(n)), -1) for n in names]))
"""


def match_patterns(
    patterns: Mapping[str, Value], names: list[str], path: Path | None
) -> dict[str, Value]:
    r"""Return the value of the first pattern that matches each name, for names that match any.

    >>> match_patterns({r"q_proj": 4, r"layers\.1\..*": 2}, ["layers.1.q_proj"], None)
    {'layers.1.q_proj': 4}

    Raises:
        AdapterError: a pattern is no regular expression, is too long or takes too long.
    """
    if not patterns:
        return {}
    keys = list(patterns)
    longest = max(keys, key=len)
    if len(longest) > _MAX_PATTERN_CHARACTERS or len(keys) > _MAX_PATTERNS:
        raise AdapterError("rank or alpha pattern is too long", path=path, got=longest)
    tables = _tables(keys) if all(_PLAIN.match(key) for key in keys) else {}
    if tables and len(tables) * len(names) <= _MAX_LOOK_UPS:
        indices = _match_plain(tables, names)
    else:
        indices = _match_in_child(keys, names, path)
    return {
        name: patterns[keys[index]]
        for name, index in zip(names, indices, strict=True)
        if index >= 0
    }


_Kind = tuple[bool, int, tuple[int, ...]]
_Tables = dict[_Kind, dict[str, int]]


def is_plain(pattern: str) -> bool:
    """Return whether a pattern has literal characters and dots only, and can be looked up."""
    return bool(_PLAIN.match(pattern)) and len(pattern) <= _MAX_PATTERN_CHARACTERS


def matching(patterns: Iterable[str], names: list[str]) -> set[str]:
    """Return the patterns that match any of some names.

    Those of literal characters and dots are looked up all at once, however many there are; any
    other is matched by itself, in a process of its own.

    Raises:
        AdapterError: a pattern is no regular expression, is too long or takes too long.
    """
    keys = list(patterns)
    plain = [key for key in keys if is_plain(key)]
    tables = _tables(plain)
    reached = {index for name in names for index in _reached(tables, name)}
    found = set()
    for key in plain:
        kind, text = _place(key)
        if tables[kind][text] in reached:
            found.add(key)
    slow = set(keys) - set(plain)
    return found | {key for key in keys if key in slow and match_patterns({key: 1}, names, None)}


def _tables(keys: list[str]) -> _Tables:
    """Sort patterns of literal characters and dots into tables.

    Keys with wildcard dots at the same places differ only in literal characters, so one
    dictionary per set of places finds the match of a name whose characters there are blanked.
    """
    tables: _Tables = {}
    for index, key in enumerate(keys):
        kind, text = _place(key)
        tables.setdefault(kind, {}).setdefault(text, index)
    return tables


def _place(key: str) -> tuple[_Kind, str]:
    """Return the table that a pattern belongs to, and the text that it has there."""
    characters = re.findall(r"\\?.", key.removeprefix("^"))
    wild = tuple(i for i, c in enumerate(characters) if c == ".")
    return (key.startswith("^"), len(characters), wild), "".join(c[-1] for c in characters)


def _reached(tables: _Tables, name: str) -> Iterator[int]:
    """Yield the index of the first pattern in each table that matches a name."""
    starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
    tails = {len(name) - start: name[start:] for start in starts}
    for (anchored, length, wild), table in tables.items():
        tail = tails.get(length)
        if tail is None or (anchored and length != len(name)):
            continue
        index = table.get(blanked(tail, wild))
        if index is not None:
            yield index


def _match_plain(tables: _Tables, names: list[str]) -> list[int]:
    """Return the index of the first pattern that matches each name, -1 where none does."""
    return [min(_reached(tables, name), default=-1) for name in names]


def matches_whole(pattern: str, name: str) -> bool:
    """Return whether a foreign regular expression matches a whole name.

    Raises:
        AdapterError: it is none, is too long or takes too long.
    """
    if len(pattern) > _MAX_PATTERN_CHARACTERS:
        raise AdapterError("regular expression is too long", got=pattern)
    return _in_child([pattern], [name], None, form=r"(?:{})\Z") == [0]


def _match_in_child(keys: list[str], names: list[str], path: Path | None) -> list[int]:
    return _in_child(keys, names, path, form=r"(.*\.)?({})$")


def _in_child(keys: list[str], names: list[str], path: Path | None, *, form: str) -> list[int]:
    patterns = [form.replace("{}", key) for key in keys]
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise _too_slow(keys, path) from error
    if child.returncode < 0:
        raise _too_slow(keys, path)
    if child.returncode != 0:
        raise AdapterError(
            "a regular expression is wrong",
            path=path,
            got=child.stderr.strip().splitlines()[-1] if child.stderr.strip() else keys[0],
        )
    indices: list[int] = json.loads(child.stdout)
    return indices


def _too_slow(keys: list[str], path: Path | None) -> AdapterError:
    return AdapterError(
        "a regular expression takes too long to match",
        path=path,
        got=max(keys, key=len),
        hint="Write the module names instead of a regular expression",
    )
