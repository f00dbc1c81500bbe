"""One adapter of a fleet: skipped if it is done, made otherwise, and reported in one record."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools import __version__
from loratools.pipeline.fleet.key import digests_read, is_current, key_of, report_statement
from loratools.pipeline.fleet.origin import Origin, Seen, origin_of
from loratools.pipeline.fleet.outcome import Outcome, State
from loratools.pipeline.fleet.shared import decompositions, shared_inputs
from loratools.pipeline.fleet.store import OWN, Store
from loratools.pipeline.fleet.stores import Folder, store_of
from loratools.pipeline.fleet.verbs import get_verb
from loratools.work.call import Call
from loratools.work.memory import keep_memory
from loratools_formats.core.file_names import WRITTEN_ENDINGS
from loratools_formats.disk.errors import (
    AdapterError,
    HubError,
    LoratoolsError,
    OutputError,
    OutputExistsError,
    StoreError,
    UnsupportedError,
    printable,
)
from loratools_formats.disk.provenance import beside_name

_ATTEMPTS = f"{OWN}/attempts"
_MOST_ATTEMPTS = 2
_PASSING = (HubError, OutputError, StoreError)
"""Errors that are no fault of the input."""


@dataclass(frozen=True)
class Task:
    """One adapter and all that a process needs to know to do it.

    Attributes:
        verb: name of the operation.
        name: of the adapter among the fleet.
        source: its path or reference.
        output: where all outputs go; None if only results are wanted.
        settings: inputs and options that all share, with absolute paths.
        overwrite: whether an output of another run may be replaced.
        run: the run's own name, where a process that dies must be noticed; empty if not.
        version: of the launcher.
        seen: what an earlier run knew of the files of an adapter in a store; None if nothing.
    """

    verb: str
    name: str
    source: str
    output: str | None
    settings: Mapping[str, Any]
    overwrite: bool
    run: str = ""
    version: str = __version__
    seen: Seen | None = None


def run_task(task: Task) -> Outcome:
    """Do one adapter, and return what became of it; a failure is returned, not raised.

    An error that is no fault of the input is met with a second try.
    """
    begun = time.monotonic()
    work: _Work | None = None
    first: str | None = None
    try:
        work = _Work(task)
        if task.run and not work.begin():
            raise OutputError(
                f"the process that worked on it died {_MOST_ATTEMPTS} times; it is left alone",
                hint="Run the operation on it alone to see why",
            )
        try:
            return work.outcome(begun)
        except Exception as error:
            if isinstance(error, LoratoolsError) and not isinstance(error, _PASSING):
                raise
            first = work.named(_told(error))
        return replace(work.outcome(begun), retried=first)
    except Exception as error:  # noqa: BLE001 - one adapter must not end the run
        why = _told(error) if work is None else work.named(_told(error))
        return failed(task, why, time.monotonic() - begun, retried=first)
    finally:
        if work is not None:
            work.close()
        if task.run and task.output is not None:
            _finished(task)


def run_tasks(tasks: Sequence[Task]) -> list[Outcome]:
    """Do several adapters, one after the other, in a worker."""
    keep_memory()
    return [run_task(task) for task in tasks]


def planned(task: Task) -> Outcome:
    """Return the outcome of a task on a dry run."""
    return Outcome(task.name, task.source, None, "planned", None, None, None, None, None, 0.0)


def failed(task: Task, why: str, seconds: float = 0.0, *, retried: str | None = None) -> Outcome:
    """Return the outcome of a task that failed."""
    took = round(seconds, 6)
    return Outcome(task.name, task.source, None, "failed", None, None, None, why, retried, took)


def _told(error: BaseException) -> str:
    if isinstance(error, LoratoolsError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{printable(error.filename, 500)}: "
        return f"{where}{error.strerror}"
    return f"{type(error).__name__}: {printable(error, 500)}"


class _Work:
    """One task in the process that does it."""

    def __init__(self, task: Task) -> None:
        if task.version != __version__:
            raise UnsupportedError(
                "this process has another version of loratools than the launcher",
                got=__version__,
                expected=task.version,
                hint="Install the same version everywhere",
            )
        self._task = task
        self._close: Callable[[], None] | None = None
        self._verb = get_verb(task.verb)
        self._call: Call = self._verb.recorded(task.settings)
        self._is_file = self._verb.makes_file(task.settings)
        self._store = None if task.output is None else _store(task.output)
        self._name = self._verb.output_name(task.name, task.settings)

    def begin(self) -> bool:
        """Note that a process begins with the task; return False if too many have died at it."""
        if self._store is None:
            return True
        for number in range(1, _MOST_ATTEMPTS + 1):
            if self._store.write(_mark(self._task, number), b"", new=True):
                return True
        return False

    def outcome(self, begun: float) -> Outcome:
        """Make the output unless it is there already."""
        found = None if self._store is None else self._done(self._store)
        if found is not None:
            return self._found(found, begun)
        try:
            result = self._made()
        except OutputExistsError:
            found = None if self._store is None else self._done(self._store)
            if found is None:
                raise
            return self._found(found, begun)  # another launcher was first
        told = result.to_dict()
        state: State = "found" if told.get("passed") is False else "made"
        said = None if self._store is None else self._store.statement(self._name)
        return self._outcome(state, None if said is None else said[0], told, begun)

    def _found(self, said: Mapping[str, Any], begun: float) -> Outcome:
        """Return the outcome of earlier work, with the numbers of its report if there is one."""
        told: dict[str, Any] | None = None
        if not self._is_file and self._store is not None:
            told = _of_report(self._store.read(self._name), self._store.shown(self._name))
        state: State = "found" if told and told.get("passed") is False else "done"
        return self._outcome(state, said, told, begun)

    def _done(self, store: Store) -> dict[str, Any] | None:
        """Return the statement of the output, if it is what would be made now."""
        said = store.statement(self._name)
        if said is None:
            return None
        predicate, made_ns = said
        origin, others = self._origin(), self._others()
        is_same = is_current(predicate, self._verb, self._call, origin, others, made_ns)
        if is_same and store.holds(self._name, predicate.get("subject") or []):
            return predicate
        return None

    def _made(self) -> Any:
        overwrite = self._task.overwrite
        if self._store is None:
            return self._called({})
        if not overwrite and self._store.exists(self._name, self._claim()):
            what = "output" if self._is_file else "report"
            raise OutputExistsError(
                f"the {what} was made from other inputs, with other options or by another version",
                path=self._store.shown(self._name),
                hint="Pass `overwrite=True` to make it anew",
            )

        def work(path: Path) -> Any:
            return self._called({"output": path, "overwrite": overwrite})

        make = work if self._is_file else self._reported
        return self._store.make(self._name, make, self._claim(), overwrite=overwrite)

    def _claim(self) -> bytes:
        """Return a mark of the inputs and options, for use while the output is put."""
        task, others = self._task, self._others()
        content = [task.source, task.verb, dict(self._call.options), self._call.seed, __version__]
        text = json.dumps([*content, sorted((name, str(path)) for name, path in others.items())])
        return hashlib.sha256(text.encode()).hexdigest().encode()

    def _reported(self, path: Path) -> Any:
        """Write the result as JSON, with the statement beside it.

        How long it took is in the manifest, so that equal runs write equal bytes.
        """
        result = self._called({})
        told = {key: value for key, value in result.to_dict().items() if key != "seconds"}
        text = json.dumps(told, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
        origin, others = self._origin(), self._others()
        data = origin.named(text).encode("utf-8", "surrogatepass")
        said = report_statement(self._verb, self._call, origin, others, data, path)
        local = store_of(path.parent)
        # The statement is read first: a report without one is not ours and is not replaced.
        local.write(beside_name(path.name), said)
        if not local.write(path.name, data, new=not self._task.overwrite):
            raise OutputExistsError("the output appeared meanwhile", path=path)
        return result

    def _called(self, where: Mapping[str, Any]) -> Any:
        """Call the public function."""
        given = {**self._task.settings, **shared_inputs(self._verb, self._task.settings)}
        if "cache" in self._verb.options and given.get("base") and isinstance(self._store, Folder):
            given.setdefault("cache", decompositions(self._store))
        if "workers" in self._verb.options and self._task.run:
            given.setdefault("workers", 1)  # processes go over adapters; no threads in each
        origin = self._origin()
        origin.bring(weights=self._verb.reads_weights(self._task.settings))
        return self._verb.call(**{self._verb.item: str(origin.path)}, **given, **where)

    @functools.cache  # noqa: B019 - lives as long as the task
    def _origin(self) -> Origin:
        """Return where the adapter is, or will be."""
        found = origin_of(self._task.source, self._verb.want, self._task.seen or {})
        self._close = found.close
        return found

    def close(self) -> None:
        """Take away what was brought here."""
        if self._close is not None:
            self._close()

    def _others(self) -> dict[str, Path]:
        """Return where the inputs are that all share, and the options that are files."""
        settings = self._task.settings
        found = {name: Path(value) for name, value in self._call.arguments.items()}
        for name, want in self._verb.inputs.items():
            value = settings.get(name)
            if isinstance(value, list | tuple):
                value = value[0] if len(value) == 1 else None
            if value is not None:
                found[name] = _local(value, want)
        return found

    def _outcome(
        self,
        state: State,
        said: Mapping[str, Any] | None,
        told: Mapping[str, Any] | None,
        begun: float,
    ) -> Outcome:
        subjects = [] if said is None else said.get("subject") or []
        weights = [s for s in subjects if str(s.get("name")).endswith(WRITTEN_ENDINGS)]
        digest: Mapping[str, str] = next((s.get("digest", {}) for s in (*weights, *subjects)), {})
        return Outcome(
            name=self._task.name,
            source=self._task.source,
            output=None if self._store is None else self._store.shown(self._name),
            state=state,
            key=None if said is None else key_of(said),
            digest=digest.get("sha256", digest.get("headerSha256")),
            result=None if told is None else self._scalars(told),
            error=None,
            retried=None,
            seconds=round(time.monotonic() - begun, 6),
            seen=None if said is None else self._seen(said),
        )

    def _scalars(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of a result is a number or a word."""
        named = self._origin().named
        words = {k: named(v) if isinstance(v, str) else v for k, v in told.items()}
        return {k: v for k, v in words.items() if v is None or isinstance(v, str | int | float)}

    def named(self, text: str) -> str:
        """Return an error's text with the adapter's address, if it was brought here."""
        return text if self._close is None else self._origin().named(text)

    def _seen(self, said: Mapping[str, Any]) -> Seen | None:
        """Return the store's marks of the adapter's files, with the digests that were read."""
        marks = self._origin().marks
        digests = digests_read(said, self._verb.item)
        found = {name: (mark, digests.get(name, "")) for name, mark in marks.items()}
        return found if any(digest for _, digest in found.values()) else None


def _of_report(data: bytes | None, place: str) -> dict[str, Any]:
    try:
        told = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise AdapterError("is no report of loratools", path=place)
    return told


@functools.lru_cache(maxsize=4)
def _store(place: str) -> Store:
    return store_of(place)


def _local(path: str, want: Any) -> Path:
    if os.path.lexists(path):
        return Path(path)
    from loratools.hub.resolve import located

    return located(path, want, beside="all" if want == "adapter" else "nothing") or Path(path)


def _mark(task: Task, number: int) -> str:
    return f"{_ATTEMPTS}/{task.run}/{task.name}.{number}"


def _finished(task: Task) -> None:
    """Take back the marks of a task that came to an end."""
    assert task.output is not None
    for number in range(1, _MOST_ATTEMPTS + 1):
        _store(task.output).remove(_mark(task, number))
