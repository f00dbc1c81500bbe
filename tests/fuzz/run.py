"""Mutates files of every format for some minutes, and keeps what breaks loratools.

    python tests/fuzz/run.py --minutes 10 [--seed 0] [--only gguf]

Cases are numbered: the same seed gives the same cases in the same order, whatever the machine. A
fault is written to `tests/fuzz/found/`, where `test_found.py` tries it again with every test run;
one for each place in the code and kind of error. Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.fspath(Path(__file__).parent))

from case import Outcome, tried, warmed
from mutate import mutated
from seeds import Seed, make

FOUND = Path(__file__).parent / "found"


def one(seed: Seed, data: bytes, root: Path) -> Outcome:
    """Return what becomes of a seed with other bytes in its mutated file, which is then mended."""
    sound = seed.mutated.read_bytes()
    try:
        seed.mutated.write_bytes(data)
        return tried(seed, root / "room")
    finally:
        seed.mutated.write_bytes(sound)


def keep(seed: Seed, data: bytes, outcome: Outcome) -> Path:
    """Write a fault's bytes and what they are."""
    FOUND.mkdir(exist_ok=True)
    digest = hashlib.sha256(data).hexdigest()[:12]
    (FOUND / f"{digest}.bin").write_bytes(data)
    facts = {"seed": seed.name, "kind": outcome.kind, "text": outcome.text, "place": outcome.place}
    path = FOUND / f"{digest}.json"
    path.write_text(json.dumps(facts, indent=2) + "\n")
    return path


def main() -> int:
    """Run until the time is over, and print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="")
    options.add_argument("--truncations", action="store_true", help="every prefix, nothing else")
    given = options.parse_args()
    # In memory, where nothing waits for a disk.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory))
    tempfile.tempdir = os.fspath(root)
    counts: dict[str, collections.Counter[str]] = {}
    faults: dict[tuple[str, str], Path] = {}
    try:
        made = make(root)
        exact = any(seed.format == given.only for seed in made)
        seeds = [s for s in made if (s.format == given.only if exact else given.only in s.format)]
        for seed in seeds:
            warmed(seed, root / "room")
        end = time.monotonic() + 60 * given.minutes
        for seed, data in _cases(seeds, given.seed, truncations=given.truncations):
            if time.monotonic() > end:
                break
            outcome = one(seed, data, root)
            counts.setdefault(seed.format, collections.Counter())[outcome.kind] += 1
            what = (outcome.kind, outcome.place or outcome.text[:40])
            if outcome.is_fault and what not in faults:
                faults[what] = keep(seed, data, outcome)
                print(f"{seed.name}: {outcome.kind} {outcome.text} {outcome.place}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for name, counter in sorted(counts.items()):
        done = ", ".join(f"{count} {kind}" for kind, count in sorted(counter.items()))
        print(f"{name}: {sum(counter.values())} cases: {done}")
    print(f"{len(faults)} faults")
    return 1 if faults else 0


def _cases(seeds, number, *, truncations):
    """Yield seeds and bytes: the sound files first, then mutations, each format as often."""
    if truncations:
        for seed in seeds:
            data = seed.mutated.read_bytes()
            yield from ((seed, data[:length]) for length in range(len(data)))
        return
    by_format: dict[str, list[Seed]] = {}
    for seed in seeds:
        by_format.setdefault(seed.format, []).append(seed)
        if not number:
            yield seed, seed.mutated.read_bytes()
    turn = number * 1_000_000_000
    while True:
        for members in by_format.values():
            seed = members[turn % len(members)]
            name = f"{seed.name}{'' if seed.mutated.suffix in seed.name else seed.mutated.suffix}"
            yield seed, mutated(seed.mutated.read_bytes(), name, turn)
        turn += 1


if __name__ == "__main__":
    sys.exit(main())
