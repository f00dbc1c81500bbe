"""`fleet`: one operation over thousands of adapters, resumed by content."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from loratools.face.declare import public
from loratools.face.result import Result
from loratools.pipeline.fleet.engine import outcomes
from loratools.pipeline.fleet.manifest import Manifest
from loratools.pipeline.fleet.outcome import Outcome
from loratools.pipeline.fleet.shared import forget_decompositions
from loratools.pipeline.fleet.sources import Member, members
from loratools.pipeline.fleet.store import OWN, Store
from loratools.pipeline.fleet.stores import store_of
from loratools.pipeline.fleet.task import Task, planned
from loratools.pipeline.fleet.verbs import Verb, get_verb
from loratools.work.cluster import Engine, has_dask
from loratools.work.collection import check_apart
from loratools.work.declared import option
from loratools.work.parallel import check_workers, usable_cores
from loratools.work.requests import Progress
from loratools.work.shard import Shard, shard, shard_of_environment
from loratools.work.spellings import nbytes
from loratools_formats.disk.errors import LoratoolsError, OptionError

_SAVE_SECONDS = 15.0
_LAUNCHERS = f"{OWN}/launchers"


def _workers() -> int:
    return usable_cores() if has_dask() else 1


@dataclass(frozen=True)
class Fleeting:
    """How a fleet is run.

    Attributes:
        output: folder of results, or an address such as s3://bucket/folder or
            hf://buckets/user/name.
        shard: take only part I of N; every process of a batch takes another. By default the part
            that SLURM's arrays and indexed Jobs of Kubernetes state in the environment.
        workers: processes here, 1 to 64; by default the cores that may be used, or 1 without Dask.
        scheduler: let workers of Dask do the work; the address of the scheduler, tcp:// or tls://.
        memory_limit: memory of each process here, such as 4GB; one that takes more is stopped.
        fail_fast: stop at the first adapter that fails.
        overwrite: replace outputs that another run made, of other inputs or with other options.
        dry_run: list what would be done, but do nothing.

    Raises:
        OptionError: a number out of range.
    """

    output: Path | None = option(None, heading="Output", short="-o")
    shard: Shard | None = option(None, heading="Selection", metavar="I/N", parse=shard)
    workers: int = option(factory=_workers, heading="Computing")
    scheduler: str | None = option(None, heading="Computing", metavar="ADDRESS")
    memory_limit: int | None = option(None, heading="Computing", metavar="SIZE", parse=nbytes)
    fail_fast: bool = option(False, heading="Output")
    overwrite: bool = option(False, heading="Output")
    dry_run: bool = option(False, heading="Output")

    def __post_init__(self) -> None:
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetResult(Result):
    """What became of a fleet, or of one shard of it.

    Attributes:
        verb: the operation.
        output: where results are; None if nothing was to be kept.
        dry_run: whether nothing was done.
        shard: the part, as I/N.
        total: adapters of the whole fleet.
        made: adapters whose output was made.
        done: those whose output was there.
        found: those in which a check or a verification found something.
        failed: those that failed.
        left: those that were not reached, or would be done on a dry run.
        seconds: that it took.
        adapters: what became of each, by name.
    """

    operation: ClassVar[str] = "fleet"

    verb: str
    output: str | None
    dry_run: bool
    shard: str
    total: int
    made: int
    done: int
    found: int
    failed: int
    left: int
    seconds: float
    adapters: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and no check found anything."""
        return not (self.failed or self.found)


Told = Callable[[Outcome], None]
"""Called with what became of an adapter, as soon as it is known."""


@public()
def fleet(
    verb: str,
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    settings: Mapping[str, Any] | None = None,
    *,
    options: Fleeting,
    progress: Progress | None = None,
) -> FleetResult:
    """Run one operation over many adapters, here, in shards or on a cluster, resumed by content.

    An adapter is skipped if its output exists and the output's statement names the same inputs,
    options and version. A run can therefore be stopped and started again, and several can run at
    once.

    >>> import tempfile
    >>> import loratools as lt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     given = ("squeeze", "examples/tiny-llama/*lora", {"rank": 4})
    ...     runs = [lt.fleet(*given, output=folder, workers=1) for _ in range(2)]
    ...     [(run.made, run.done) for run in runs]
    [(2, 0), (0, 2)]

    Args:
        verb: check, convert, dequantize, extract, fuse, info, quantize, repair, spectrum, squeeze,
            to-dora, to-lora or verify.
        sources: adapters: paths, wildcards, folders, lists in files, hf://organisation/*.
        settings: the operation's other inputs and its options, as keyword arguments of its
            function.
        progress: called with (adapters done, adapters in all).

    Raises:
        OptionError: no such operation or option, or no output for an operation that makes one.
        AdapterError: wildcards match nothing.
        MissingFileError: an adapter is not there.
        MissingDependencyError: several processes need Dask, which is not installed.
    """
    count = [0]

    def tell(_: Outcome) -> None:
        count[0] += 1
        if progress is not None:
            progress(count[0], len(todo.tasks))

    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    todo = plan(verb, [os.fspath(one) for one in given], settings or {}, options)
    return todo.run(tell)


def plan(verb: str, sources: Sequence[str], settings: Mapping[str, Any], options: Fleeting) -> Plan:
    """Return what is to be done, after every check that needs no adapter's weights.

    Raises:
        LoratoolsError: as `fleet`.
    """
    found = get_verb(verb)
    checked = found.checked(settings)
    if options.output is None and found.makes_file(checked) and not options.dry_run:
        raise OptionError("no output given", hint="Add `output=FOLDER`")
    store = None if options.output is None else store_of(options.output)
    all_members = members(sources, found.want, None if store is None else store.shown())
    if store is not None:
        check_apart(
            (PurePosixPath(found.output_name(member.name, checked)), member.source)
            for member in all_members
        )
    return Plan(found, checked, options, store, all_members)


class Plan:
    """A fleet to be run: the adapters of one shard, each a task."""

    def __init__(
        self,
        verb: Verb,
        settings: Mapping[str, Any],
        options: Fleeting,
        store: Store | None,
        all_members: Sequence[Member],
    ) -> None:
        self._verb, self._options, self._store = verb, options, store
        self._settings, self._total = settings, len(all_members)
        self._part = options.shard or shard_of_environment()
        self.tasks = [
            Task(
                verb=verb.name,
                name=member.name,
                source=member.source,
                output=None if store is None else store.shown(),
                settings=settings,
                overwrite=options.overwrite,
            )
            for member in self._part.of(all_members)
        ]

    def run(self, tell: Told | None = None) -> FleetResult:
        """Do it, and return what became of each adapter.

        Raises:
            LoratoolsError: the engine cannot be started, or the manifest cannot be written.
        """
        begun = time.monotonic()
        ended: list[Outcome] = []
        if self._options.dry_run:
            ended += map(planned, self.tasks)
        else:
            self._run(ended, tell)
        counts = Counter(outcome.state for outcome in ended)
        return FleetResult(
            verb=self._verb.name,
            output=None if self._store is None else self._store.shown(),
            dry_run=self._options.dry_run,
            shard=str(self._part),
            total=self._total,
            made=counts["made"],
            done=counts["done"],
            found=counts["found"],
            failed=counts["failed"],
            left=len(self.tasks) - len(ended) + counts["planned"],
            seconds=0.0 if self._options.dry_run else round(time.monotonic() - begun, 6),
            adapters=tuple(sorted(ended, key=lambda outcome: outcome.name)),
        )

    def _run(self, ended: list[Outcome], tell: Told | None) -> None:
        manifest = None
        if self._store is not None:
            call = self._verb.recorded(self._settings)
            manifest = Manifest(self._store, self._verb.name, self._part, dict(call.options))
        is_new = self._store is not None and self._store.is_new()
        mine = self._begin()
        saved = time.monotonic()
        tasks = self._ordered(first=mine)
        if manifest is not None:
            tasks = [replace(each, seen=manifest.seen(each.name, each.source)) for each in tasks]
        names = {each.name for each in tasks}
        running, has_started = outcomes(tasks, self._engine()), True
        try:
            for outcome in running:
                known = outcome if manifest is None else manifest.remembered(outcome)
                ended.append(known)
                if tell is not None:
                    tell(known)
                if manifest is not None and time.monotonic() - saved > _SAVE_SECONDS:
                    manifest.write(ended, names)
                    saved = time.monotonic()
                if self._options.fail_fast and outcome.state == "failed":
                    break
        except LoratoolsError:  # of the engine; a signal may come after workers made something
            has_started = bool(ended)
            raise
        finally:
            running.close()
            try:
                if manifest is not None and has_started:
                    manifest.write(ended, names)
            finally:
                self._end(first=mine)
                if self._store is not None and is_new and not has_started:
                    self._store.drop()

    def _engine(self) -> Engine:
        options = self._options
        is_alone = len(self.tasks) < 2 and options.scheduler is None
        if is_alone:
            return Engine(1, None, None)
        return Engine(options.workers, options.scheduler, options.memory_limit)

    def _begin(self) -> bool:
        """Return whether this launcher is the first at this shard, as far as marks tell."""
        return self._store is None or self._store.write(self._mark(), b"", new=True)

    def _end(self, *, first: bool) -> None:
        if first and self._store is not None:
            forget_decompositions(self._store)
            self._store.remove(self._mark())

    def _mark(self) -> str:
        return f"{_LAUNCHERS}/{self._verb.name}.{self._part.index}-of-{self._part.count}"

    def _ordered(self, *, first: bool) -> list[Task]:
        """Return the tasks by name; of a launcher that came later, in an order of its own.

        Launchers of the same shard share the work this way, without asking each other: what one
        has made, the other finds. A mark that a killed launcher left does no more harm than that.
        """
        if first:
            return self.tasks
        return random.sample(self.tasks, len(self.tasks))  # nothing depends on the order
