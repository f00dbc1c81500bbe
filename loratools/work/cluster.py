"""Processes that share work: started here, or those of a scheduler of Dask.

Workers are processes. Their BLAS is held to one thread before NumPy is loaded, and a watcher of
Dask's (its nanny) starts a new one when one dies or grows beyond its memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from loratools_formats.disk.errors import ClusterError, MissingDependencyError

_ONE_THREAD = {
    f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")
} | {"VECLIB_MAXIMUM_THREADS": "1"}
_MOST_DEATHS = 1
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


@contextlib.contextmanager
def connected(engine: Engine) -> Iterator[Any]:
    """Yield a client of the scheduler, or of processes that are started here.

    Raises:
        MissingDependencyError: Dask is not installed.
        ClusterError: the scheduler cannot be reached, or processes cannot be started.
    """
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
            raise _unreachable(engine.scheduler, str(error)) from error
        except TypeError as error:  # Dask's, of a context for TLS that is None
            problem = "no certificates are set for TLS, or not all that it takes"
            raise _unreachable(engine.scheduler, problem) from error
        with client:
            try:
                client.wait_for_workers(1, timeout=_START_SECONDS)
            except TimeoutError as error:
                raise ClusterError("the scheduler has no workers", got=engine.scheduler) from error
            yield client
        return
    settings = {
        "distributed.nanny.pre-spawn-environ": _ONE_THREAD,
        "distributed.scheduler.allowed-failures": _MOST_DEATHS,
        "distributed.worker.daemon": False,
        "distributed.worker.profile.enabled": False,  # it looks at each process all 10 ms
    }
    with dask.config.set(settings):
        try:
            # What is set already would win over Dask's settings.
            with _environment(_ONE_THREAD), _unbothered():
                cluster = LocalCluster(
                    n_workers=engine.workers,
                    threads_per_worker=1,
                    processes=True,
                    memory_limit="auto" if engine.memory_limit is None else engine.memory_limit,
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                    silence_logs=logging.CRITICAL,
                )
        except (RuntimeError, OSError) as error:
            raise ClusterError(
                f"processes cannot be started: {error}",
                hint="A script needs `if __name__ == '__main__':` around it; `workers=1` does not",
            ) from error
        with cluster, Client(cluster) as client:
            yield client


@contextlib.contextmanager
def _unbothered() -> Iterator[None]:
    """Keep Ctrl-C from the threads and processes that are started while the context lasts.

    A terminal sends it to all of them; this process alone hears it, and stops the others. What
    comes meanwhile comes when the context ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # a thread that starts it later would hear Ctrl-C again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unreachable(address: str, why: str) -> ClusterError:
    is_tls = address.startswith("tls:")
    return ClusterError(
        f"the scheduler cannot be reached: {why}",
        got=address,
        expected="tcp://HOST:PORT or tls://HOST:PORT",
        hint="Certificates are settings of Dask: distributed.comm.tls"
        if is_tls
        else "Start one with `dask scheduler` and name the address that it prints, or leave out "
        "`scheduler`",
    )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of this process's environment, which children get, while the context lasts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
