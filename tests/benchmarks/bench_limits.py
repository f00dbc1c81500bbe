"""The heaviest commands beside what the machine can do: forming ΔW, the optimum, copying, NumPy."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from measure import Command, Sample, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "examples" / "tiny-llama" / "lora"
TIES_LIMIT, EXTRACT_LIMIT, EXCESS = 12.0, 5.0, 1e-3
LIMITS = {"DoRA → LoRA": 1.5, "linear merge": 1.5, "squeeze 256 → 32": 8.0}
KOHYA, KOHYA_LIMIT = 1000, 10.0
SCALES, START = 1.8, 2.0
METHODS = ("ties", "dare_ties", "della", "breadcrumbs")
HEADER = ["what", "wall", "CPU", "peak memory", "others"]
ROUNDS = 2
TEXT = f"""\
Whole commands as fresh processes, the least of {ROUNDS} runs, processor time of all threads; with
one worker unless it is said. Merges by entries: four adapters of rank 16 on one layer of a 7B
Llama, to rank 16, beside forming each ΔW once in float32 with one thread, in a process that counts
the products alone. `extract --rank 32` of three matrices of 107 M entries together, bf16. The
others: one DoRA of 4096 × 11008 to rank 16; two of rank 16, and one of rank 256, on all linears of
a 7B Llama; `lt.read` of {KOHYA} kohya files of 792 tensors and 400 training tags; `squeeze` of a
tiny adapter. Two processes at once: what two that multiply and round, and share nothing, do more
than one alone, which is what this machine lets two threads gain. Fusing into GGUF beside copying is
in the section on GGUF."""
READ = "import sys, pathlib, loratools as lt\nfor p in pathlib.Path({!r}).iterdir(): lt.read(p)"


class _Runs:
    """Runs commands, keeps their best samples, and lists them all."""

    def __init__(self, workdir: Path) -> None:
        self.rows: list[Row] = []
        self._workdir = workdir
        self.pair = self.peer("pair")
        self._out = workdir / "limits-out"

    def made(self, folder: str, script: str, *arguments: str) -> str:
        """Write an input unless it is there."""
        if not (self._workdir / folder).exists():
            run_child(Command([sys.executable, str(HERE / script), *arguments]), self._workdir)
        return folder

    def peer(self, *arguments: str) -> float:
        """Return the number that a peer prints."""
        words = [sys.executable, str(HERE / "limits_peer.py"), *arguments]
        return float(run_child(Command(words), self._workdir).stdout)

    def python(self, name: str, code: str) -> Sample:
        """Run a line of Python."""
        return self._best(name, Command([sys.executable, "-c", code]))

    def ours(self, name: str, *arguments: str, workers: int | None = 1) -> Sample:
        """Run a command of ours, whose output is removed before each run."""
        words = [tool("loratools"), *arguments, "-o", self._out.name]
        if workers is not None:
            words += ["--workers", str(workers)]
        return self._best(name, Command(words, lambda: shutil.rmtree(self._out, True)))

    def _best(self, name: str, command: Command) -> Sample:
        found = [run_child(command, self._workdir) for _ in range(ROUNDS)]
        best = min(found, key=lambda sample: sample.cpu_seconds)
        wall = min(sample.seconds for sample in found)
        peak = max(sample.peak_bytes for sample in found)
        cells = [
            seconds(wall), seconds(best.cpu_seconds), megabytes(peak), cores(best.other_cores),
        ]  # fmt: skip
        self.rows.append(Row(name, cells))
        return Sample(wall, best.cpu_seconds, peak, best.other_cores, best.stdout)


def run(workdir: Path) -> Report:
    """Run the benchmark."""
    runs = _Runs(workdir)
    targets = [*_merges(runs), *_extract(runs), *_limits(runs), *_small(runs)]
    table = Table("All runs", HEADER, runs.rows)
    return Report("The heaviest commands beside their limits", TEXT, targets, [table])


def _merges(runs: _Runs) -> list[Target]:
    given = [
        runs.made(name, "synthetic.py", name, "--rank", "16", "--layers", "1", "--seed", str(seed))
        for seed, name in enumerate(f"limits-layer-{number}" for number in range(4))
    ]
    formed = runs.peer("form", *given)
    start = runs.ours("start", "squeeze", str(TINY), "--rank", "4").cpu_seconds
    targets, one = [], {}
    for method in METHODS:
        one[method] = runs.ours(method, "merge", *given, "--method", method, "--rank", "16")
        times = (one[method].cpu_seconds - start) / formed
        targets.append(
            Target(
                f"`{method}` takes at most {TIES_LIMIT:g}× forming each ΔW once",
                f"{ratio(times)}: {seconds(one[method].cpu_seconds)}, of which {seconds(start)} to "
                f"start, against {seconds(formed)}",
                times <= TIES_LIMIT,
            )
        )
    two = runs.ours(
        "ties, 2 workers", "merge", *given, "--method", "ties", "--rank", "16", workers=2
    )
    return [*targets, _scaled(runs, "`ties`", one["ties"], two)]


def _extract(runs: _Runs) -> list[Target]:
    runs.made("old", "limits_peer.py", "checkpoints")
    least = runs.peer("optimum", "32")
    words = "extract", "old", "new", "--rank", "32", "--json"
    one, two = (runs.ours(f"extract, {n} workers", *words, workers=n) for n in (1, 2))
    error = json.loads(one.stdout)["relative_error"]
    return [
        Target(
            f"`extract` of 107 M entries in {EXTRACT_LIMIT:g} s of processor time, its error "
            f"within {EXCESS:.1%} of the optimum",
            f"{seconds(one.cpu_seconds)}, {error / least - 1.0:.3%} above",
            one.cpu_seconds <= EXTRACT_LIMIT and error <= least * (1.0 + EXCESS),
        ),
        _scaled(runs, "`extract`", one, two),
    ]


def _limits(runs: _Runs) -> list[Target]:
    sizes = [str(number) for number in (4096, 11008, 16)]
    runs.made("dora", "fold_peer.py", "make", *sizes)
    pair = [
        runs.made(name, "synthetic.py", name, "--rank", "16", "--seed", name[-1])
        for name in ("limits-r16-0", "limits-r16-1")
    ]
    wide = runs.made("limits-r256", "synthetic.py", "limits-r256", "--rank", "256")
    commands = {
        "DoRA → LoRA": ("to-lora", "dora", "--base", "base", "--rank", "16"),
        "linear merge": ("merge", *pair),
        "squeeze 256 → 32": ("squeeze", wide, "--rank", "32"),
    }
    targets = []
    for name, words in commands.items():
        found = runs.ours(name, *words)
        targets.append(
            Target(
                f"{name} in {LIMITS[name]:g} s of processor time",
                seconds(found.cpu_seconds),
                found.cpu_seconds <= LIMITS[name],
            )
        )
        two = runs.ours(f"{name}, 2 workers", *words, workers=2)
        targets.append(_scaled(runs, name, found, two))
    return targets


def _small(runs: _Runs) -> list[Target]:
    files = runs.made("limits-kohya", "limits_peer.py", "kohya", "limits-kohya", str(KOHYA))
    headers = runs.python(f"headers of {KOHYA} files", READ.format(files))
    numpy = runs.python("import numpy", "import numpy")
    tiny = runs.ours("squeeze of a tiny adapter", "squeeze", str(TINY), "--rank", "4", workers=None)
    return [
        Target(
            f"headers of {KOHYA} kohya files in {KOHYA_LIMIT:g} s",
            seconds(headers.seconds),
            headers.seconds <= KOHYA_LIMIT,
        ),
        Target(
            f"`squeeze` of a tiny adapter in {START:g}× `import numpy`",
            f"{ratio(tiny.seconds / numpy.seconds)}: {seconds(tiny.seconds)} against "
            f"{seconds(numpy.seconds)}",
            tiny.seconds <= START * numpy.seconds,
        ),
    ]


def _scaled(runs: _Runs, name: str, one: Sample, two: Sample) -> Target:
    gain = one.seconds / two.seconds
    return Target(
        f"{name} from one worker to two: {SCALES:g}×",
        f"{ratio(gain)}, two processes at once {ratio(runs.pair)}; memory "
        f"{megabytes(one.peak_bytes)} and {megabytes(two.peak_bytes)}",
        gain >= SCALES,
    )
