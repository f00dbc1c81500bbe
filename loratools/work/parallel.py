"""Threads over independent modules, with results in order and bytes that do not depend on them.

Where there are fewer modules than threads, at the end of a run too, `in_parts` gives those without
a module a share of the rows of one.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from threadpoolctl import ThreadpoolController, threadpool_limits

from loratools.work.declared import option
from loratools.work.requests import Progress
from loratools.work.typed import check_options
from loratools_formats.disk.errors import OptionError

MOST_WORKERS = 64
_AT_ONCE = 0.001  # seconds, up to which two threads over modules were measured to be slower

Item = TypeVar("Item")
Result = TypeVar("Result")


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many cores this process may use: its affinity, and the quota of its cgroup.

    Args:
        cgroup: where the group of the process is mounted (Linux, cgroup v2 and v1).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _quota(cgroup)
    return max(1, min(cores or 1, MOST_WORKERS, cores or 1 if quota is None else quota))


def _quota(cgroup: Path) -> int | None:
    """Return the cores that a cgroup grants, rounded up; None where it sets no limit."""
    v1 = cgroup / "cpu"
    for files in ([cgroup / "cpu.max"], [v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            return -(-int(quota) // int(period))
    return None


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many threads a run uses on the CPU.

    Attributes:
        workers: threads on the CPU, 1 to 64; by default the cores that the process may use. Results
            do not depend on it.

    Raises:
        OptionError: out of range.
    """

    workers: int = option(factory=usable_cores, heading="Computing")

    def __post_init__(self) -> None:
        check_options(self)
        check_workers(self.workers)


class _OneThread:
    """Holds BLAS to one thread as long as anybody works, in whatever order they begin and end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._working = 0
        self._limits: threadpool_limits | None = None
        self._known: ThreadpoolController | None = None
        self._modules = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._working:
                self._limits = self._controller().limit(limits=1)
            self._working += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._working -= 1
            if not self._working and self._limits is not None:
                self._limits.restore_original_limits()
                self._limits = None

    def _controller(self) -> ThreadpoolController:
        """Return what sets the threads of all libraries; a library comes with a Python module."""
        if self._known is None or self._modules != len(sys.modules):
            self._known, self._modules = ThreadpoolController(), len(sys.modules)
        return self._known


_ONE_THREAD = _OneThread()


def one_blas_thread() -> AbstractContextManager[None]:
    """Hold BLAS to one thread, on which the order of every sum and so its last digit depends.

    The number belongs to the process. Two runs side by side would each restore what it found, and
    the first to end would give the other its threads back; this counts who works.
    """
    return _ONE_THREAD


def check_workers(workers: int) -> None:
    """Raise `OptionError` unless the number of threads is in the range that every command has."""
    if not 1 <= workers <= MOST_WORKERS:
        raise OptionError(
            "workers is out of range", got=workers, expected=f"from 1 to {MOST_WORKERS}"
        )


class _Team:
    """The threads of one run: how many there are, and how many of them nobody needs.

    Args:
        workers: threads.
        items: how many modules they work on.

    Attributes:
        helpers: threads that take parts of an item, each in place of an idle one.
    """

    def __init__(self, workers: int, items: int) -> None:
        self.helpers = ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        self._workers = workers
        self._waiting = items
        self._busy = self._lent = 0

    def run(self, function: Callable[[Item], Result], item: Item) -> Result:
        """Return function(item), which may borrow threads meanwhile."""
        with self._lock:
            self._waiting -= 1
            self._busy += 1
        _OWN.team = self
        try:
            return function(item)
        finally:
            _OWN.team = None
            with self._lock:
                self._busy -= 1

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[int]:
        """Lend a fair share of the threads that nobody needs, until the end of the context."""
        with self._lock:
            idle = self._workers - self._busy - self._lent - self._waiting
            share = max(0, -(-idle // (self._busy + self._waiting)))
            self._lent += share
        try:
            yield share
        finally:
            with self._lock:
                self._lent -= share


class _Own(threading.local):
    """What belongs to a thread: the team in which it works on an item."""

    team: _Team | None = None


_OWN = _Own()


def in_order(
    function: Callable[[Item], Result], items: Collection[Item], workers: int
) -> Iterator[Result]:
    """Yield function(item) for each item, in order, computing a few ahead in threads.

    BLAS is held to one thread: NumPy releases the interpreter's lock, so threads over modules use
    the cores better, and the order of every sum stays the same. What ends at once is waited for,
    since threads that take turns at that lock are slower than one.
    """
    with one_blas_thread():
        if workers <= 1:
            yield from map(function, items)
            return
        team = _Team(workers, len(items))
        with ThreadPoolExecutor(workers) as pool, team.helpers:
            waiting: deque[Future[Result]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(team.run, function, item))
                    with contextlib.suppress(TimeoutError):
                        waiting[-1].exception(_AT_ONCE)
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def done_in_order(
    function: Callable[[Item], Result],
    items: Collection[Item],
    workers: int,
    progress: Progress | None,
) -> list[Result]:
    """Return function(item) for each item, in order; `progress` hears of each that is done."""
    done: list[Result] = []
    for result in in_order(function, items, workers):
        done.append(result)
        if progress is not None:
            progress(len(done), len(items))
    return done


def in_parts(
    function: Callable[[Item], Result], parts: Sequence[Item], *, at_once: int = 1
) -> Iterator[Result]:
    """Yield function(part) for each part of one item, in order, using threads that nobody needs.

    Args:
        function: called in this thread or others, with this thread's context.
        parts: what to call it with.
        at_once: how many a thread takes, at most, where one is short.
    """
    team = _OWN.team
    with contextlib.nullcontext(0) if team is None else team.borrowed() as lent:
        if team is None or not lent:
            yield from map(function, parts)
            return
        count = max(1, min(at_once, len(parts) // (4 * lent)))
        waiting: deque[Future[list[Result]]] = deque()
        try:
            for start in range(0, len(parts), count):
                some = parts[start : start + count]
                if sum(not future.done() for future in waiting) < lent:
                    own = contextvars.copy_context()
                    waiting.append(team.helpers.submit(own.run, _each, function, some))
                else:  # this thread works, too
                    waiting.append(_done(function, some))
                while waiting and (waiting[0].done() or len(waiting) > lent + 1):
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _done(function: Callable[[Item], Result], items: Iterable[Item]) -> Future[list[Result]]:
    """Return what has been done already; an error waits for its place, too."""
    found: Future[list[Result]] = Future()
    try:
        found.set_result(_each(function, items))
    except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
        found.set_exception(error)
    return found


def _each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    return [function(item) for item in items]
