"""Progress on stderr for whatever takes longer than a second.

A terminal shows a bar with rate and remaining time. A log file or CI gets a line for every tenth.
`LORATOOLS_PROGRESS=never` keeps both away.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from loratools.cli.output import human_bytes, say
from loratools.work.requests import Progress

_DELAY = 1.0
_VARIABLE = "LORATOOLS_PROGRESS"


@contextlib.contextmanager
def progress_bar(label: str, *, quiet: bool, unit: str = "module") -> Iterator[Progress | None]:
    """Yield a function to call with (done, total), or None if progress is not wanted.

    Args:
        label: what is being done.
        quiet: show nothing.
        unit: what is counted; `B` for bytes.
    """
    if quiet or sys.stderr is None or os.environ.get(_VARIABLE) == "never":
        yield None
    elif not sys.stderr.isatty():
        yield Lines(label, unit)
    else:
        from tqdm import tqdm

        with tqdm(
            desc=label,
            unit=unit,
            unit_scale=unit == "B",
            file=sys.stderr,
            leave=False,
            delay=_DELAY,
            dynamic_ncols=True,
        ) as bar:

            def update(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield update


class Lines:
    """A line for every tenth that is done, once a second has passed.

    Args:
        label: what is being done.
        unit: what is counted.
        clock: returns seconds.
    """

    def __init__(self, label: str, unit: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._unit, self._clock = label, unit, clock
        self._began = clock()
        self._told = 0

    def __call__(self, done: int, total: int) -> None:
        """Say how far it is, if another tenth is done."""
        tenth = 10 * done // total if total else 10
        passed = self._clock() - self._began
        if tenth <= self._told or tenth >= 10 or passed < _DELAY:
            return
        self._told = tenth
        rate = done / passed
        left = _duration((total - done) / rate)
        say(f"{self._label}: {10 * tenth} %, {self._rate(rate)}, {left} left", err=True)

    def _rate(self, rate: float) -> str:
        if self._unit == "B":
            return f"{human_bytes(int(rate))}/s"
        return f"{rate:.3g} {self._unit}s/s"


def _duration(seconds: float) -> str:
    """Return a time for people.

    >>> _duration(8.4), _duration(135), _duration(7500)
    ('8 s', '2 min 15 s', '2 h 5 min')
    """
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
