"""How a fleet's tasks are run: in this process, or by workers of Dask here or anywhere.

Workers are processes. Their BLAS is held to one thread before NumPy is loaded, and a watcher of
Dask's (its nanny) starts a new one when one dies or grows beyond its memory.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from loratools.pipeline.fleet.task import Outcome, Task, failed, run_task
from loratools_formats.disk.errors import HubError, MissingDependencyError

_ONE_THREAD = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
} | {"VECLIB_MAXIMUM_THREADS": "1"}
_MOST_DEATHS = 1
_LEAST_AHEAD = 32
_START_SECONDS = 60


@dataclass(frozen=True)
class Engine:
    """Who does the work.

    Attributes:
        workers: processes here; 1 for this one alone.
        scheduler: address of a scheduler of Dask, in place of processes here.
        memory_limit: bytes that each process here may take; None for a share of the machine's.
    """

    workers: int
    scheduler: str | None
    memory_limit: int | None

    @property
    def is_spread(self) -> bool:
        """Whether other processes do the work."""
        return self.scheduler is not None or self.workers > 1


def has_dask() -> bool:
    """Return whether `distributed` is installed."""
    from importlib.util import find_spec

    return find_spec("distributed") is not None


def outcomes(tasks: Sequence[Task], engine: Engine) -> Generator[Outcome]:
    """Yield what became of each task, as they end; the rest is dropped when this is closed.

    Raises:
        MissingDependencyError: other processes are wanted, and Dask is not installed.
        HubError: the scheduler cannot be reached.
    """
    if not engine.is_spread:
        yield from map(run_task, tasks)
        return
    with _client(engine) as client:
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


@contextlib.contextmanager
def _client(engine: Engine) -> Iterator[Any]:
    """Yield a client of the scheduler, or of processes that are started here."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise MissingDependencyError(
            "several processes need Dask", hint="pip install 'loratools[fleet]', or `workers=1`"
        ) from error
    if engine.scheduler is not None:
        try:
            client = Client(engine.scheduler, timeout=_START_SECONDS)
        except (OSError, ValueError, TimeoutError) as error:
            raise HubError(
                f"the scheduler cannot be reached: {error}",
                got=engine.scheduler,
                expected="tcp://HOST:PORT or tls://HOST:PORT",
            ) from error
        with client:
            client.wait_for_workers(1, timeout=_START_SECONDS)
            yield client
        return
    settings = {
        "distributed.nanny.pre-spawn-environ": {**_ONE_THREAD, "MALLOC_TRIM_THRESHOLD_": "65536"},
        "distributed.scheduler.allowed-failures": _MOST_DEATHS,
        "distributed.worker.daemon": False,
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=engine.workers,
            threads_per_worker=1,
            processes=True,
            memory_limit="auto" if engine.memory_limit is None else engine.memory_limit,
            dashboard_address=None,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
