"""`loratools squeeze` on adapters shaped like a 7B Llama, beside peers and physical limits."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hotspots import profile
from measure import Command, Sample, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
LAYERS = 32
# Modules of each shape in one layer; synthetic.py writes them.
MODULES = {"4096x4096": 4, "11008x4096": 2, "4096x11008": 1}
# The full SVD of this shape takes over a minute and is not timed: it counts as its transpose, whose
# SVD is the same and which takes LAPACK a third of the time. So (a) is a lower bound.
SKIPPED, TRANSPOSED = "4096x11008", "11008x4096"
WEIGHTS = "adapter_model.safetensors"
ROUNDS = {64: 7, 256: 3}
TARGET_SVD, TARGET_LOWRANK, TARGET_PEAK_BYTES = 500, 25, 300e6
TARGET_GROWTH = 0.01
HEADER = ["what", "best", "median", "CPU", "peak memory", "others", "best ÷ ours"]
TEXT = f"""\
All seven linears of {LAYERS} layers, bf16 (tests/benchmarks/synthetic.py). Whole commands are
child processes, timed from outside: start-up, reading, digesting, computing, checking, writing,
fsync. Every input is in the page cache. Runs of what is compared are interleaved, after one
unmeasured run each, with all dirty pages flushed before each run; best and median of the wall
times, least CPU time of all threads, largest peak memory. "Others" is how many cores other
processes kept busy during the best run: where it is not near 0, the wall time is that of a shared
machine. MB are 10⁶ bytes."""


@dataclass(frozen=True)
class Estimate:
    """Seconds for all modules, scaled up from some; the fastest process that measured them."""

    best: float
    median: float
    process: Sample


def _adapter(workdir: Path, rank: int, layers: int = LAYERS) -> Path:
    """Make an adapter unless an earlier run left it, in a child process to keep this one small."""
    name = f"r{rank}-layers{layers}"
    if not (workdir / name / "adapter_config.json").exists():  # which is written last
        script = str(HERE / "synthetic.py")
        options = ["--rank", str(rank), "--layers", str(layers)]
        run_child(Command([sys.executable, script, name, *options]), workdir)
    return workdir / name


def _squeeze(adapter: Path, rank: int) -> Command:
    out = adapter.with_name("squeezed")
    arguments = ["squeeze", adapter.name, "-o", out.name, "--rank", str(rank), "-q"]
    return Command(
        [tool("loratools"), *arguments], before=lambda: shutil.rmtree(out, ignore_errors=True)
    )


def _copy(adapter: Path) -> Command:
    copy = adapter.with_name("copy")
    return Command(
        ["cp", f"{adapter.name}/{WEIGHTS}", copy.name],
        before=lambda: copy.unlink(missing_ok=True),
    )


def _write(adapter: Path) -> Command:
    copy = adapter.with_name("written")
    return Command(
        ["dd", f"if=squeezed/{WEIGHTS}", f"of={copy.name}", "bs=8388608", "conv=fsync"],
        before=lambda: copy.unlink(missing_ok=True),
    )


def _whole(adapter: Path, rank: int) -> dict[str, Command]:
    return {"ours": _squeeze(adapter, rank), "copy": _copy(adapter), "write": _write(adapter)}


def _starts() -> dict[str, Command]:
    return {
        "start": Command([tool("loratools"), "squeeze", "--help"]),
        "numpy": Command([sys.executable, "-c", "import numpy"]),
        "torch": Command([sys.executable, "-c", "import torch"]),
    }


def _peer(method: str, adapter: Path, rank: int, *options: str) -> Command:
    arguments = [method, adapter.name, "--rank", str(rank), *options]
    return Command([sys.executable, str(HERE / "peers.py"), *arguments])


def _scaled_up(samples: Sequence[Sample]) -> Estimate:
    """Multiply what peers.py printed by the number of modules of each shape."""
    times: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for shape, found in json.loads(sample.stdout).items():
            times[shape] += found
    if SKIPPED not in times:
        times[SKIPPED] = times[TRANSPOSED]
    return Estimate(
        LAYERS * sum(count * min(times[shape]) for shape, count in MODULES.items()),
        LAYERS * sum(count * statistics.median(times[shape]) for shape, count in MODULES.items()),
        min(samples, key=lambda sample: sample.seconds),
    )


def _imports_torch(adapter: Path, rank: int) -> bool:
    program = (
        "import sys, atexit; from loratools.cli import main; "
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    command = _squeeze(adapter, rank)
    arguments = [sys.executable, "-c", program, *command.arguments[1:]]
    printed = run_child(Command(arguments, command.before), adapter.parent).stdout.split()
    return printed != ["False"]


def _timed(name: str, timing: Timing, ours: Timing) -> Row:
    return Row(
        name,
        [
            seconds(timing.best),
            seconds(timing.median),
            seconds(timing.cpu),
            megabytes(timing.peak_bytes),
            cores(timing.other_cores),
            ratio(timing.best / ours.best),
        ],
    )


def _scaled(name: str, estimate: Estimate, ours: Timing) -> Row:
    return Row(
        name,
        [
            seconds(estimate.best),
            seconds(estimate.median),
            "–",
            megabytes(estimate.process.peak_bytes),
            cores(estimate.process.other_cores),
            ratio(estimate.best / ours.best),
        ],
    )


def _faster(
    wanted: str, best: float, median: float, factor: float, ours: Timing, why: str
) -> Target:
    met = [best / ours.best >= factor, median / ours.median >= factor]
    excess, limit = ours.best * factor / best, best / factor
    if all(met):
        why = ""
    elif met[0]:
        why = f"The medians miss it by {ratio(factor * ours.median / median)}. {why}"
    else:
        why = (
            f"Takes {ratio(excess)} what it may: {seconds(ours.best)}, not {seconds(limit)}. {why}"
        )
    measured = f"{ratio(best / ours.best)} (medians {ratio(median / ours.median)})"
    return Target(wanted, measured, met[0], why)


def _memory(timings: dict[int, Timing], sizes: dict[int, int]) -> tuple[Table, Target]:
    smallest, largest = min(timings), max(timings)
    growth = timings[largest].peak_bytes - timings[smallest].peak_bytes
    input_growth = sizes[largest] - sizes[smallest]
    met = growth <= TARGET_GROWTH * input_growth
    rows = [
        Row(
            str(layers),
            [
                megabytes(sizes[layers]),
                megabytes(timing.peak_bytes),
                seconds(timing.best),
                seconds(timing.median),
            ],
        )
        for layers, timing in sorted(timings.items())
    ]
    header = ["layers", "input", "peak memory", "best", "median"]
    target = Target(
        f"peak memory does not grow with the input (by under {TARGET_GROWTH:.0%} of its growth)",
        f"{megabytes(growth)} more peak for {megabytes(input_growth)} more input",
        met,
        "" if met else f"grows by {growth / input_growth:.1%} of the input's growth",
    )
    return Table("Peak memory by size of the input, rank 64 → 16", header, rows), target


def _rank_table(
    rank: int,
    new_rank: int,
    timings: dict[str, Timing],
    svd: Estimate,
    lowrank: Estimate,
) -> Table:
    ours = timings["ours"]
    names = {
        "start": "start-up: loratools squeeze --help",
        "numpy": "python -c 'import numpy'",
        "torch": "python -c 'import torch'",
        "copy": "copy of the input: cp",
        "write": "the output's bytes: dd conv=fsync",
    }
    rows = [_timed("**loratools squeeze**", ours, ours)]
    rows.append(_scaled("(a) PEFT's way, ΔW and torch.linalg.svd; scaled", svd, ours))
    rows.append(_scaled("(b) ΔW and torch.svd_lowrank; scaled", lowrank, ours))
    rows += [_timed(name, timings[key], ours) for key, name in names.items()]
    both = timings["torch"].best + timings["copy"].best
    both_median = timings["torch"].median + timings["copy"].median
    cells = [seconds(both), seconds(both_median), "–", "–", "–", ratio(both / ours.best)]
    rows.append(Row("import torch + copy", cells))
    remark = (
        f"Ours: `{ours.command}`, {len(ours.samples)} runs. (a) and (b) are the arithmetic alone, "
        "without import, reading or writing, in torch's default threads, times the number of "
        "modules. (a): one module of each shape, `full_matrices=True` as in PEFT, timed once; "
        f"{SKIPPED}, which takes over a minute, counts as its faster transpose, so that (a) is a "
        "lower bound; at any rank the dense ΔW and its cost are the same. (b): "
        f"`q={new_rank + 10}, niter=2`, every module of one layer, in as many runs."
    )
    return Table(f"Rank {rank} → {new_rank}", HEADER, rows, remark)


def run(workdir: Path) -> Report:
    """Measure everything; leaves its adapters in `workdir`."""
    adapters = {rank: _adapter(workdir, rank) for rank in (64, 256)}
    new_rank = {64: 16, 256: 32}
    timings: dict[int, dict[str, Timing]] = {}
    for rank, adapter in adapters.items():
        commands = _whole(adapter, new_rank[rank]) | ({} if timings else _starts())
        commands["lowrank"] = _peer("lowrank", adapter, new_rank[rank])
        timings[rank] = {**timings.get(64, {}), **interleaved(commands, workdir, ROUNDS[rank])}
    lowrank = {rank: _scaled_up(found["lowrank"].samples) for rank, found in timings.items()}
    options = ["--one-each", "--skip", SKIPPED]
    svd = _scaled_up([run_child(_peer("svd", adapters[64], new_rank[64], *options), workdir)])
    by_layers = {
        layers: interleaved({"ours": _squeeze(_adapter(workdir, 64, layers), 16)}, workdir, 2)[
            "ours"
        ]
        for layers in (8, 64)
    }
    by_layers[LAYERS] = timings[64]["ours"]
    sizes = {n: (_adapter(workdir, 64, n) / WEIGHTS).stat().st_size for n in by_layers}
    memory_table, memory_target = _memory(by_layers, sizes)
    spots = {r: profile(_squeeze(adapter, new_rank[r]), workdir) for r, adapter in adapters.items()}

    ours, torch, copy = (timings[64][name] for name in ("ours", "torch", "copy"))
    shared = ours.middle.other_cores
    why = (
        f"Start-up takes {seconds(timings[64]['start'].best)}; of the rest most goes, with one "
        f"worker, to {spots[64]}. During the median run of ours others kept {cores(shared)} cores "
        "busy."
    )
    together = torch.best + copy.best, torch.median + copy.median
    full, thin = (svd.best, svd.median), (lowrank[64].best, lowrank[64].median)
    imported = _imports_torch(adapters[64], 16)
    peak = ours.peak_bytes
    targets = [
        _faster(f"≥ {TARGET_SVD}× faster than (a)", *full, TARGET_SVD, ours, why),
        _faster(f"≥ {TARGET_LOWRANK}× faster than (b)", *thin, TARGET_LOWRANK, ours, why),
        _faster("faster than import torch plus the copy", *together, 1, ours, why),
        Target(
            "torch is never imported on the CPU",
            "torch in sys.modules at exit" if imported else "not in sys.modules at exit",
            not imported,
            "something imports it" if imported else "",
        ),
        Target(
            f"peak memory under {megabytes(TARGET_PEAK_BYTES)}",
            f"{megabytes(peak)} (rank 256: {megabytes(timings[256]['ours'].peak_bytes)})",
            peak < TARGET_PEAK_BYTES,
            "" if peak < TARGET_PEAK_BYTES else f"{megabytes(peak - TARGET_PEAK_BYTES)} too much",
        ),
        memory_target,
    ]
    tables = [_rank_table(r, new_rank[r], timings[r], svd, lowrank[r]) for r in adapters]
    tables += [memory_table, *(found.table(f"rank {rank}") for rank, found in spots.items())]
    return Report("squeeze (targets for rank 64)", TEXT, targets, tables)
