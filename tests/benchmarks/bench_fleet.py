"""`loratools fleet`: many adapters in one run against a loop of the single command."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from measure import Command, Sample, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
FASTER, SCALES, FLAT = 5.0, 1.5, 1.1
RULE = ("--rank", "4")
HEADER = ["how", "adapters", "wall", "CPU", "CPU for each", "largest process", "others"]
IN_PYTHON = (
    "import sys, pathlib, loratools as lt; "
    "[lt.squeeze(p, rank=4, workers=1, output=f'{sys.argv[2]}/{p.name}') "
    "for p in sorted(pathlib.Path(sys.argv[1]).iterdir())]"
)
LOOP = 'for a in "$1"/*; do "$0" squeeze "$a" -o "$2/${a##*/}" --rank 4 -q; done'
TEXT = """\
`fleet squeeze` of {many} small adapters (32 modules of width 128, rank 8 → 4) and of {large} larger
ones (112 modules of width 4096, rank 64 → 4), by one process and by two workers of Dask, against a
shell loop of `loratools squeeze`, which is timed on {looped} and {looped_large} of them and
extrapolated. Processor time counts all processes, with their start. Tiny adapters (2 modules of
width 16) show what each of {few} and of {lots} costs beyond the start of the program. A single
run: where other processes keep the cores busy, processor time tells more than wall time. Scaling is
from one process with one thread, since one process has a thread for each core by itself."""


@dataclass(frozen=True)
class Counts:
    """How many adapters there are of each size, and how many the shell loops take."""

    many: int = 200
    large: int = 20
    looped: int = 20
    looped_large: int = 4
    few: int = 100
    lots: int = 2000


def run(workdir: Path, counts: Counts = Counts()) -> Report:
    """Run the benchmark; fewer adapters are for a machine that is busy."""
    small = _made(workdir, "small", counts.many, 32, 128, 8)
    large = _made(workdir, "large", counts.large, 112, 4096, 64)
    tiny = _made(workdir, "tiny", counts.lots, 2, 16, 4)
    rows: list[Row] = []
    found: dict[str, tuple[Sample, int]] = {}

    def measured(name: str, count: int, command: Sequence[str]) -> None:
        out = workdir / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        sample = run_child(Command(command), workdir)
        found[name] = sample, count
        cells = [
            str(count), seconds(sample.seconds), seconds(sample.cpu_seconds),
            f"{1000 * sample.cpu_seconds / count:.3g} ms", megabytes(sample.peak_bytes),
            cores(sample.other_cores),
        ]  # fmt: skip
        rows.append(Row(name, cells))

    def fleet(folder: Path, workers: int, *more: str) -> list[str]:
        given = [tool("loratools"), "fleet", "squeeze", str(folder), "-o", str(workdir / "out")]
        return [*given, f"--workers={workers}", "-q", "--", *RULE, *more]

    for name, folder, looped in (
        ("small", small, counts.looped),
        ("large", large, counts.looped_large),
    ):
        part = _part(workdir, folder, looped)
        count = len(list(folder.iterdir()))
        loop = ["bash", "-c", LOOP, tool("loratools"), str(part), str(workdir / "out")]
        measured(f"{name}: loop of the command", looped, loop)
        python = [sys.executable, "-c", IN_PYTHON, str(folder), str(workdir / "out")]
        measured(f"{name}: lt.squeeze in one process", count, python)
        measured(f"{name}: fleet, one process", count, fleet(folder, 1))
        one_thread = fleet(folder, 1, "--workers", "1")
        measured(f"{name}: fleet, one process, one thread", count, one_thread)
        measured(f"{name}: fleet, two workers", count, fleet(folder, 2))
    for count in (1, counts.few, counts.lots):
        measured(f"tiny: fleet of {count}", count, fleet(_part(workdir, tiny, count), 1))
    measured("tiny: fleet of two, two workers", 2, fleet(_part(workdir, tiny, 2), 2))
    text = TEXT.format(**vars(counts))
    return Report("Fleets", text, _targets(found, counts), [Table("All runs", HEADER, rows)])


def _targets(found: dict[str, tuple[Sample, int]], counts: Counts) -> list[Target]:
    def each(name: str) -> float:
        sample, count = found[name]
        return sample.cpu_seconds / count

    def waited(name: str, start: str = "") -> float:
        return found[name][0].seconds - (found[start][0].seconds if start else 0.0)

    start = found["tiny: fleet of 1"][0].cpu_seconds
    few, lots = (
        (found[f"tiny: fleet of {count}"][0].cpu_seconds - start) / (count - 1)
        for count in (counts.few, counts.lots)
    )
    dask = found["tiny: fleet of two, two workers"][0].cpu_seconds - start
    gain = each("small: loop of the command") / each("small: fleet, one process")
    in_python, alone = each("small: lt.squeeze in one process"), each("small: fleet, one process")
    spread = found["small: fleet, two workers"][0].cpu_seconds - dask
    task = spread / counts.many - alone
    one, two = "large: fleet, one process, one thread", "large: fleet, two workers"
    with_start = waited(one) / waited(two)
    scaled = waited(one, "tiny: fleet of 1") / waited(two, "tiny: fleet of two, two workers")
    peaks = [found[f"{name}: fleet, two workers"][0].peak_bytes for name in ("small", "large")]
    return [
        Target(
            f"{counts.many} small adapters: {FASTER:g}× less processor time than the loop",
            f"{ratio(gain)} less: {1000 * alone:.3g} ms each",
            gain >= FASTER,
        ),
        Target(
            "what a fleet adds to each adapter: digests, marks, its line; under 10 ms",
            f"{1000 * (alone - in_python):.3g} ms",
            alone - in_python < 0.010,
        ),
        Target(
            "what Dask adds to each task, its start apart; under 10 ms",
            f"{1000 * task:.3g} ms; the start of two workers {seconds(dask)}",
            task < 0.010,
            "" if task < 0.010 else _busy(found["small: fleet, two workers"][0]),
        ),
        Target(
            f"large ones from one thread to two workers, the start of both apart: {SCALES:g}× the "
            "adapters per second",
            f"{ratio(scaled)}; {ratio(with_start)} with the start",
            scaled >= SCALES,
            "" if scaled >= SCALES else _busy(found["large: fleet, two workers"][0]),
        ),
        Target(
            "memory of each worker: under 250 MB",
            " and ".join(map(megabytes, peaks)),
            max(peaks) < 250e6,
        ),
        Target(
            f"each of {counts.lots:,} costs what each of {counts.few} does (within {FLAT:g}×)",
            f"{1000 * few:.3g} ms and {1000 * lots:.3g} ms",
            lots <= FLAT * few,
        ),
    ]


def _busy(sample: Sample) -> str:
    return f"other processes kept {cores(sample.other_cores)} of the cores busy"


def _made(workdir: Path, name: str, *numbers: int) -> Path:
    folder = workdir / f"fleet-{name}"
    script = str(HERE / "small_adapters.py")
    run_child(Command([sys.executable, script, str(folder), *map(str, numbers)]), workdir)
    return folder


def _part(workdir: Path, folder: Path, count: int) -> Path:
    """Return a folder with the first of some adapters."""
    part = workdir / f"{folder.name}-{count}"
    if not part.exists():
        part.mkdir()
        for place in sorted(folder.iterdir())[:count]:
            shutil.copytree(place, part / place.name)
    return part
