"""Many adapters in several processes, since headers are parsed by the interpreter alone.

A child is this module, run as a program: it reads one JSON object from stdin, which names its
adapters, and prints one line of JSON for each. Bases, formats and rules are those of this process;
plugins are found again. Adapters in memory stay in this process.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools.operations.check.options import CheckOptions
from loratools.operations.check.outcome import (
    Asked,
    CheckedAdapter,
    CheckFinding,
    Outcome,
    Unchecked,
)
from loratools.operations.check.remedy import Remedy

FEWEST = 32
"""Adapters of one child at least; fewer are done by then in this process."""


def children_for(adapters: int, workers: int) -> int:
    """Return how many processes are worth their start, 0 if none is."""
    count = min(workers, adapters // FEWEST)
    return count if count > 1 and sys.executable else 0


def in_children(sources: Sequence[Path], asked: Asked, count: int) -> Iterator[Outcome]:
    """Yield the outcome of each adapter, in order.

    What a child that ended early has left undone is done here.
    """
    shares = [sources[first::count] for first in range(count)]
    children = [_started(share, asked) for share in shares]
    try:
        for number, source in enumerate(sources):
            output = children[number % count].stdout
            line = b"" if output is None else output.readline()
            yield _decoded(line) if line.endswith(b"\n") else asked.outcome(source)
    finally:
        for child in children:
            child.kill()
            child.wait()
            if child.stdout is not None:
                child.stdout.close()


def _started(share: Sequence[Path], asked: Asked) -> subprocess.Popen[bytes]:
    options = asked.options
    values = {
        "sources": [str(path) for path in share],
        "select": options.select,
        "ignore": options.ignore,
        "target": options.target,
        "headers_only": options.headers_only,
        "base": None if asked.base is None else str(asked.base.base.path),
        "format_name": asked.format_name,
        "carry_unknown": asked.carry_unknown,
        "accepted": sorted(asked.accepted),
        "named": {str(path): asked.named[path] for path in share if path in asked.named},
    }
    command = [sys.executable, "-P", "-m", __name__]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    if child.stdin is not None:
        try:
            child.stdin.write(json.dumps(values).encode())
            child.stdin.close()
        except OSError:  # it ended at once: its share is done in this process
            pass
    return child


def _decoded(line: bytes) -> Outcome:
    values = json.loads(line)
    if "reason" in values:
        return Unchecked(**values)
    findings = tuple(
        CheckFinding(**{**each, "remedy": each["remedy"] and Remedy(**each["remedy"])})
        for each in values["findings"]
    )
    return CheckedAdapter(**values["adapter"]), findings


def _encoded(outcome: Outcome) -> str:
    if isinstance(outcome, Unchecked):
        return json.dumps(asdict(outcome))
    adapter, findings = outcome
    return json.dumps({"adapter": asdict(adapter), "findings": [asdict(f) for f in findings]})


def main() -> None:
    """Check the adapters that stdin names."""
    from loratools.base.pipelines import read_base
    from loratools.operations.check.runner import names_of
    from loratools.work.parallel import in_order

    gc.set_threshold(100_000)  # the objects of one adapter are many, and none is in a cycle
    values: dict[str, Any] = json.load(sys.stdin)
    asked = Asked(
        CheckOptions(
            select=tuple(values["select"]),
            ignore=tuple(values["ignore"]),
            target=tuple(values["target"]),
            headers_only=values["headers_only"],
        ),
        None if values["base"] is None else names_of(read_base(values["base"])),
        values["format_name"],
        values["carry_unknown"],
        frozenset(values["accepted"]),
        {Path(path): name for path, name in values["named"].items()},
    )
    for outcome in in_order(asked.outcome, [*map(Path, values["sources"])], 1):
        sys.stdout.write(_encoded(outcome) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
