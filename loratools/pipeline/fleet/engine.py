"""How a fleet's tasks are run: in this process, or by workers of Dask here or anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from loratools.pipeline.fleet.task import Outcome, Task, failed, run_task
from loratools.work.cluster import Engine, connected

_LEAST_AHEAD = 32


def outcomes(tasks: Sequence[Task], engine: Engine) -> Generator[Outcome]:
    """Yield what became of each task, as they end; the rest is dropped when this is closed.

    Raises:
        MissingDependencyError: other processes are wanted, and Dask is not installed.
        ClusterError: the scheduler cannot be reached.
    """
    if not engine.is_spread:
        yield from map(run_task, tasks)
        return
    with connected(engine) as client:
        yield from _spread(client, tasks)


def _spread(client: Any, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Yield outcomes from a client's workers, with a few tasks per worker waiting there."""
    from distributed import as_completed

    run = uuid4().hex
    named = (replace(task, run=run) for task in tasks)
    threads = sum(client.nthreads().values())
    by_future: dict[Any, Task] = {}

    def submit(task: Task) -> Any:
        future = client.submit(run_task, task, pure=False, retries=0)
        by_future[future] = task
        return future

    ahead = max(_LEAST_AHEAD, 4 * threads)
    running = as_completed([submit(task) for task in itertools.islice(named, ahead)])
    try:
        for future in running:
            task = by_future.pop(future)
            yield _outcome(future, task)
            future.release()
            for following in itertools.islice(named, 1):
                running.add(submit(following))
    finally:
        client.cancel(list(by_future))


def _outcome(future: Any, task: Task) -> Outcome:
    error = future.exception()
    if error is None:
        found: Outcome = future.result()
        return found
    kind = type(error).__name__
    if kind == "KilledWorker":
        return failed(task, "every process that worked on it died; it is left alone")
    return failed(task, f"{kind}: {error}")
