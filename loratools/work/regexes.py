"""Regular expressions that may come from a stranger's recipe, searched in names.

Python's engine can be made to run for ever. Patterns with at most two repeats, each of one
character, cannot take long over a name, and are searched here. Others are searched by a child
process, one for all, in which every pattern may use so much processor time; the clock does not
count, so that a busy machine refuses nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import select
import shlex
import subprocess
import sys
import threading
from typing import Any

from loratools_formats.disk.errors import OptionError

_LONGEST_PATTERN = 4096
_LONGEST_NAME = 1024
_CPU_SECONDS = 1
_TIMEOUT_SECONDS = 120.0  # of the clock, for systems that do not count CPU time
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_REPEAT = re.compile(r"[*+?{]")

_CHILD = f"""
import json, re, signal, sys, time
left = {{}}
for line in sys.stdin:
    pattern, name = json.loads(line)
    begun = time.process_time()
    limit = left.setdefault(pattern, {_CPU_SECONDS})
    if hasattr(signal, "setitimer"):  # not on Windows; what ends it there is the parent's clock
        signal.setitimer(signal.ITIMER_PROF, max(limit, 1e-3))
    found = re.search(pattern, name) is not None
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, 0)
    left[pattern] = limit - (time.process_time() - begun)
    print(int(found), flush=True)
"""


def check_regex(pattern: str) -> None:
    """Raise `OptionError` if a pattern is no regular expression, or is too long."""
    if len(pattern) > _LONGEST_PATTERN:
        raise OptionError(
            "a regular expression is too long",
            got=f"{len(pattern)} characters",
            expected=f"at most {_LONGEST_PATTERN}",
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise OptionError(
            f"not a regular expression: {error}", got=pattern, hint=_of_glob(pattern)
        ) from error


def _of_glob(pattern: str) -> str | None:
    """Return a question for the regular expression that a pattern of a shell stands for.

    >>> _of_glob("*q_proj")
    "Did you mean '.*q_proj'?"
    """
    meant = pattern.replace(".", r"\.").replace("*", ".*").replace("?", ".")
    try:
        re.compile(meant)
    except (re.error, RecursionError, OverflowError):
        return None
    return f"Did you mean {shlex.quote(meant)}?"


@functools.lru_cache(maxsize=1 << 16)
def is_found(pattern: str, name: str) -> bool:
    r"""Return whether a sound regular expression is found in a name.

    >>> is_found(r"layers\.\d+\.", "model.layers.3.q_proj"), is_found("^(q|k)+$", "q_proj")
    (True, False)

    Raises:
        OptionError: the search takes too long.
    """
    if _is_quick(pattern) and len(name) <= _LONGEST_NAME:
        return re.search(pattern, name) is not None
    return _MATCHER.search(pattern, name)


def _is_quick(pattern: str) -> bool:
    """Whether no search in a name can take long: two repeats at most, none of a group."""
    bare = _ESCAPED.sub("a", pattern).replace("(?:", "(")
    repeats = [found.start() for found in _REPEAT.finditer(bare)]
    return len(repeats) <= 2 and all(bare[place - 1 : place] != ")" for place in repeats)


class _Matcher:
    """The child process; it is started when it is first needed, and again after it was killed."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def search(self, pattern: str, name: str) -> bool:
        with self._lock:
            answer = self._ask(json.dumps([pattern, name]))
        if not answer:
            raise OptionError(
                "a regular expression takes too long to match",
                got=pattern,
                hint="Write it without a repeated group, or name the modules",
            )
        return answer.strip() == "1"

    def _ask(self, question: str) -> str:
        if self._child is None or self._owner != os.getpid():
            self._owner = os.getpid()
            atexit.register(self._end)
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        child: Any = self._child
        try:
            child.stdin.write(question + "\n")
            child.stdin.flush()
            if os.name != "nt" and not select.select([child.stdout], [], [], _TIMEOUT_SECONDS)[0]:
                child.kill()
            answer: str = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._end()
        return answer

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


_MATCHER = _Matcher()
