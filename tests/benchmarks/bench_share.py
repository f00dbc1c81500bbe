"""`loratools fleet share`: fleets of 8, 32 and 100 adapters against squeezing each alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measure import Command, Sample, tool
from measure import run as run_child
from report import Report, Row, Table, Target, megabytes, seconds

HERE = Path(__file__).resolve().parent
COUNTS = (8, 32, 100)
SHARES = (0.9, 0.0)
DIAGONAL = 8  # adapters up to which diagonal cores, the slow ones, are measured
BUDGET = "20%"
HEADER = [
    "fleet", "adapters", "files", "set", "groups", "rank", "shared", "alone, at best",
    "alone, squeezed", "CPU", "peak memory",
]  # fmt: skip
TEXT = """\
Synthetic adapters of rank 16, bf16, of one layer of a model of width 512 (synthetic_fleet.py). Of
each ΔW = B A, a share of the energy of B's columns and of A's rows lies in 32 directions that all
adapters have in common. All are brought into one file of 20% of their sizes together. Errors are
‖ΔW − ΔW'‖/‖ΔW‖ over the whole fleet: of the set, as it is stored; of the best singular triplets of
each adapter alone in as many bytes, before rounding; of `squeeze` with each adapter's part of those
bytes. Whole commands, one run each: CPU time is of all threads, on a machine shared with
others."""


def run(
    workdir: Path, counts: tuple[int, ...] = COUNTS, shares: tuple[float, ...] = SHARES
) -> Report:
    """Run the benchmark; fewer and smaller fleets are for trying it out."""
    rows, gains = [], {}
    for share in shares:
        for count in counts:
            fleet = workdir / f"fleet-{count}-{share:g}"
            maker = [sys.executable, str(HERE / "synthetic_fleet.py"), str(fleet)]
            run_child(Command([*maker, str(count), f"{share:g}"]), workdir)
            for cores in ("full", "diagonal") if count <= DIAGONAL else ("full",):
                sample, found = _shared(fleet, cores, workdir)
                squeezed = _squeezed(fleet, found, workdir)
                gains[share, count, cores] = squeezed / found["relative_error"]
                rows.append(_row(f"{share:.0%} in common, {cores}", sample, found, squeezed))
            shutil.rmtree(fleet)
    family = [gain for (share, _, cores), gain in gains.items() if (share, cores) == (0.9, "full")]
    targets = [
        Target(
            "where 90% is in common, full cores lose less than squeezing each alone does",
            ", ".join(f"{gain:.2f}×" for gain in family) + " less",
            min(family) > 1.0,
        )
    ]
    return Report("Adapters in shared bases", TEXT, targets, [Table("Errors", HEADER, rows)])


def _shared(fleet: Path, cores: str, workdir: Path) -> tuple[Sample, dict[str, Any]]:
    options = ["--cores", cores, "--budget", BUDGET, "--workers", "1", "--dry-run", "--json"]
    line = [tool("loratools"), "fleet", "share", str(fleet), *options]
    sample = run_child(Command(line), workdir)
    return sample, json.loads(sample.stdout)


def _squeezed(fleet: Path, found: dict[str, Any], workdir: Path) -> float:
    """Return the error of squeezing each adapter into its part of the set's size."""
    part = str(found["bytes_out"] // len(found["adapters"]))
    line = [tool("loratools"), "squeeze", str(fleet), "--out-dir", str(workdir / "alone")]
    done = run_child(Command([*line, "--budget", part, "--dry-run", "--json"]), workdir)
    errors = [json.loads(each)["relative_error"] for each in done.stdout.splitlines()]
    # All adapters of a fleet are of nearly one size, by the way they are made.
    return float((sum(error**2 for error in errors) / len(errors)) ** 0.5)


def _row(name: str, sample: Sample, found: dict[str, Any], squeezed: float) -> Row:
    ranks = [module["rank_out"] for module in found["modules"]]
    cells = [
        str(len(found["adapters"])),
        megabytes(found["bytes_in"]),
        megabytes(found["bytes_out"]),
        str(found["groups"]),
        f"{min(ranks)}–{max(ranks)}",
        f"{found['relative_error']:.3f}",
        f"{found['alone_error']:.3f}",
        f"{squeezed:.3f}",
        seconds(sample.cpu_seconds),
        megabytes(sample.peak_bytes),
    ]
    return Row(name, cells)
