"""What a fleet's run prints: progress with rate and time left on stderr, and a table at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from loratools.cli.output import note, number, print_table, quantity, say
from loratools.cli.wording import worded
from loratools.pipeline.fleet.outcome import Outcome
from loratools.pipeline.fleet.run import FleetResult

_LINE_SECONDS = 10.0
_MOST_ROWS = 40
_NUMBERS = ("relative_error", "bytes_out")


@contextlib.contextmanager
def telling(label: str, total: int, *, quiet: bool) -> Iterator[Callable[[Outcome], None] | None]:
    """Yield what is called with each outcome: a bar on a terminal, else a line now and then."""
    if quiet:
        yield None
        return
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(desc=label, total=total, unit="adapter", file=sys.stderr, leave=False) as bar:

            def tell(_: Outcome) -> None:
                bar.update(1)

            yield tell
        return
    yield _Lines(label, total).tell


class _Lines:
    """Lines of progress for a log; a short run has none."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._done = self._failed = 0
        self._begun = self._last = time.monotonic()

    def tell(self, outcome: Outcome) -> None:
        """Count an outcome, and print a line if the last one was some time ago."""
        self._done += 1
        self._failed += outcome.state == "failed"
        now = time.monotonic()
        if now - self._last < _LINE_SECONDS:
            return
        self._last = now
        rate = self._done / max(now - self._begun, 1e-9)
        left = (self._total - self._done) / rate
        note(
            f"{self._label}: {self._done} of {quantity(self._total, 'adapter')}, {number(rate)}/s, "
            f"{duration(left)} left, {self._failed} failed"
        )


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds.

    >>> duration(3671.2), duration(9)
    ('1:01:11', '0:09')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show(found: FleetResult, *, verbose: bool) -> None:
    """Print what became of a fleet, one line for each adapter or for those that need a look."""
    shown = found.adapters
    if not verbose and not found.dry_run and len(shown) > _MOST_ROWS:
        shown = tuple(one for one in shown if one.state in ("failed", "found"))
    if shown:
        rows = [[one.name, one.state, *(_cell(one, key) for key in _NUMBERS)] for one in shown]
        print_table(["adapter", "state", "relative error", "bytes"], "<<>>", rows)
    part = "" if found.shard == "1/1" else f", shard {found.shard} of {found.total} adapters"
    counts = f"{found.made} made, {found.done} done before, {found.failed} failed"
    counts += f", {found.found} with findings" if found.found else ""
    left = f", {found.left} {'to do' if found.dry_run else 'left'}" if found.left else ""
    say(f"{found.verb}: {counts}{left}{part}")


def _cell(outcome: Outcome, key: str) -> str:
    value = None if outcome.result is None else outcome.result.get(key)
    if value is None:
        return "–"
    return number(value) if key == "relative_error" else str(value)


def tell_failures(found: FleetResult) -> None:
    """Print on stderr which adapters failed, at first or for good, and why."""
    for one in found.adapters:
        if one.retried is not None and one.retried != one.error:
            say(f"tried again: {one.name}: {worded(one.retried)}", err=True)
        if one.error is not None:
            why = worded(one.error.removeprefix(f"{one.source}: "))
            say(f"failed: {one.name}: {why}", err=True)
