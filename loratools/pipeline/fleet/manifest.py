"""The manifest: one line of JSON per adapter and one file per shard. It is a view, not a database.

Nothing is decided by it: what is done, outputs tell. A line stays while its key does, with the
result and the seconds of the run that made the output; a check that found something has the seconds
of the last run. What a run does not reach, or is not of, keeps its line. Of an adapter in an object
store it has the store's marks of the files, so that the next run need not read what is unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from loratools.pipeline.fleet.origin import Seen
from loratools.pipeline.fleet.outcome import Outcome
from loratools.pipeline.fleet.store import Store
from loratools.work.shard import Shard

SCHEMA = 1


def manifest_name(verb: str, shard: Shard) -> str:
    """Return the name of a shard's manifest among the outputs.

    >>> manifest_name("squeeze", Shard(3, 8)), manifest_name("squeeze", Shard())
    ('fleet-squeeze.3-of-8.jsonl', 'fleet-squeeze.jsonl')
    """
    part = "" if shard.count == 1 else f".{shard.index}-of-{shard.count}"
    return f"fleet-{verb}{part}.jsonl"


class Manifest:
    """The manifest of one shard.

    Args:
        store: where outputs are.
        verb: the operation.
        shard: which part.
        options: settings that are not at their default, in the types of JSON.
    """

    def __init__(self, store: Store, verb: str, shard: Shard, options: object) -> None:
        self._store, self._verb, self._options = store, verb, options
        self._name = manifest_name(verb, shard)
        self._lines: dict[str, dict[str, Any]] = {}
        self._before: dict[str, Outcome] = {}
        self._read()

    def remembered(self, outcome: Outcome) -> Outcome:
        """Return an outcome, completed by an earlier line about the same output."""
        before = self._before.get(outcome.name)
        is_same = before is not None and before.key == outcome.key is not None
        if before is None or not is_same or outcome.result is not None:
            return outcome
        return replace(outcome, result=before.result)

    def seen(self, name: str, source: str) -> Seen | None:
        """Return what an earlier run knew of the files of an adapter in a store."""
        before = self._before.get(name)
        return None if before is None or before.source != source else before.seen

    def write(self, outcomes: Iterable[Outcome], names: Collection[str]) -> None:
        """Write the manifest whole, by names.

        Args:
            outcomes: what has ended.
            names: adapters that the run is of. Of any other, a line stays only if it has a key: a
                failure is of interest while somebody tries.

        Raises:
            OutputError: it could not be written.
        """
        about = {"schema": SCHEMA, "verb": self._verb, "options": self._options}
        before = self._before.items()
        lines = {k: self._lines[k] for k, one in before if k in names or one.key is not None}
        lines |= {one.name: {**about, **self._first(one).line()} for one in outcomes}
        ordered = (lines[name] for name in sorted(lines))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered)
        self._store.write(self._name, text.encode("utf-8", "surrogatepass"))

    def _first(self, outcome: Outcome) -> Outcome:
        """Return the outcome of what was done before with the seconds of the run that did it."""
        before = self._before.get(outcome.name)
        if outcome.state != "done" or before is None or before.key != outcome.key:
            return outcome
        return replace(outcome, seconds=before.seconds)

    def _read(self) -> None:
        data = self._store.read(self._name)
        for line in (data or b"").splitlines():
            try:
                told = json.loads(line)
                outcome = Outcome.of_line(told)
                seen = {k: (str(mark), str(sha)) for k, (mark, sha) in (outcome.seen or {}).items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # of another version, or cut short: it decides nothing
            if told.get("schema") == SCHEMA:
                self._lines[outcome.name] = told
                self._before[outcome.name] = replace(outcome, seen=seen or None)
