"""How a fleet's tasks are run: in this process, or by workers of Dask here or anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from loratools.pipeline.fleet.outcome import Outcome
from loratools.pipeline.fleet.task import Task, failed, run_task, run_tasks
from loratools.work.cluster import Engine, connected

_LEAST_AHEAD = 32
_BATCH_SECONDS, _MOST_IN_BATCH, _REMEMBERED = 0.25, 16, 8
"""Small tasks go out together, since Dask takes some milliseconds for whatever is submitted."""


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
    """Yield outcomes from a client's workers, with a few batches per worker waiting there."""
    from distributed import as_completed

    run = uuid4().hex
    named = (replace(task, run=run) for task in tasks)
    threads = sum(client.nthreads().values())
    by_future: dict[Any, list[Task]] = {}

    def submit(batch: list[Task]) -> Any:
        future = client.submit(run_tasks, batch, pure=False, retries=0)
        by_future[future] = batch
        return future

    ahead = max(_LEAST_AHEAD, 4 * threads)
    running = as_completed([submit([task]) for task in itertools.islice(named, ahead)])
    usual = _BATCH_SECONDS
    try:
        for future in running:
            found, again = _outcomes(future, by_future.pop(future))
            for task in again:
                running.add(submit([task]))
            for outcome in found:
                usual += (outcome.seconds - usual) / _REMEMBERED
                yield outcome
            future.release()
            count = max(1, min(_MOST_IN_BATCH, int(_BATCH_SECONDS / max(usual, 1e-6))))
            if following := list(itertools.islice(named, count)):
                running.add(submit(following))
    finally:
        client.cancel(list(by_future))


def _outcomes(future: Any, batch: list[Task]) -> tuple[list[Outcome], list[Task]]:
    """Return what became of a batch, and which tasks are to be submitted alone.

    What a process had done of a batch when it died is found, and cost nothing; the task at which
    processes die is known by its marks, and the others of its batch do not fail with it.
    """
    error = future.exception()
    if error is None:
        return future.result(), []
    if len(batch) > 1:
        return [], batch
    kind = type(error).__name__
    why = f"{kind}: {error}"
    if kind == "KilledWorker":
        why = "every process that worked on it died; it is left alone"
    return [failed(batch[0], why)], []
