"""`loratools squeeze` on a kohya file shaped like FLUX.1, beside sd-scripts' way and copying."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flux_file import modules
from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
RANK, NEW_RANK = 128, 32
SOURCE, OUT = "flux.safetensors", "smaller.safetensors"
ROUNDS = 5
TARGET_DENSE, TARGET_COPY, TARGET_PEAK_BYTES = 15, 6, 300e6
HEADER = ["what", "best", "median", "CPU", "peak memory", "others", "best ÷ ours"]
TEXT = f"""\
{len(modules())} modules with the names and shapes of FLUX.1 in one kohya file, bf16, rank {RANK} to
{NEW_RANK}; whole commands, as for squeeze. The other way is that of sd-scripts since 0.11, dense ΔW
and `torch.svd_lowrank(q=2·rank, niter=2)`: the arithmetic alone, without import, reading or
writing, of one module of each shape, times their number."""


def _squeeze(workdir: Path) -> Command:
    def clear() -> None:
        for path in workdir.glob(f"{OUT}*"):
            path.unlink()

    arguments = ["squeeze", SOURCE, "-o", OUT, "--rank", str(NEW_RANK), "-q"]
    return Command([tool("loratools"), *arguments], before=clear)


def _copy(workdir: Path, source: str, target: str) -> Command:
    path = workdir / target
    return Command(["cp", source, target], before=lambda: path.unlink(missing_ok=True))


def _scaled(workdir: Path) -> tuple[float, Timing]:
    """Return the seconds that the dense way takes for all modules, and its process."""
    script = str(HERE / "flux_file.py")
    command = Command([sys.executable, script, "dense", SOURCE, "--rank", str(NEW_RANK)])
    timing = Timing(command, [run_child(command, workdir)])
    by_shape: dict[str, float] = json.loads(timing.samples[0].stdout)
    return sum(by_shape[f"{out}x{columns}"] for out, columns in modules().values()), timing


def _row(name: str, timing: Timing, ours: Timing) -> Row:
    cells = [
        seconds(timing.best),
        seconds(timing.median),
        seconds(timing.cpu),
        megabytes(timing.peak_bytes),
        cores(timing.other_cores),
        ratio(timing.best / ours.best),
    ]
    return Row(name, cells)


def run(workdir: Path) -> Report:
    """Measure; leaves the file in `workdir`."""
    source = workdir / SOURCE
    if not source.exists():
        script = [sys.executable, str(HERE / "flux_file.py"), "make", SOURCE]
        run_child(Command([*script, "--rank", str(RANK)]), workdir)
    commands = {"ours": _squeeze(workdir), "copy": _copy(workdir, SOURCE, "copy.safetensors")}
    timings = interleaved(commands, workdir, ROUNDS)
    run_child(_squeeze(workdir), workdir)
    timings |= interleaved({"write": _copy(workdir, OUT, "written.safetensors")}, workdir, 3)
    dense, process = _scaled(workdir)
    ours, copy = timings["ours"], timings["copy"]
    estimate = [seconds(dense), "–", "–", megabytes(process.peak_bytes)]
    rows = [
        _row("**loratools squeeze**", ours, ours),
        Row(
            "dense ΔW and torch.svd_lowrank; scaled",
            [*estimate, cores(process.other_cores), ratio(dense / ours.best)],
        ),
        _row("copy of the input: cp", copy, ours),
        _row("copy of the output: cp", timings["write"], ours),
    ]
    targets = [
        Target(
            f"≥ {TARGET_DENSE}× faster than dense ΔW and svd_lowrank",
            ratio(dense / ours.best),
            dense >= TARGET_DENSE * ours.best,
        ),
        Target(
            f"at most {TARGET_COPY}× a copy of the input",
            ratio(ours.best / copy.best),
            ours.best <= TARGET_COPY * copy.best,
            ""
            if ours.best <= TARGET_COPY * copy.best
            else "Arithmetic bounds it: Gram matrices and new factors are computed in float64.",
        ),
        Target(
            f"peak memory under {megabytes(TARGET_PEAK_BYTES)}",
            megabytes(ours.peak_bytes),
            ours.peak_bytes < TARGET_PEAK_BYTES,
        ),
    ]
    title = "squeeze of a FLUX-shaped kohya file"
    table = Table(f"Rank {RANK} → {NEW_RANK}, {megabytes(source.stat().st_size)}", HEADER, rows)
    return Report(title, TEXT, targets, [table])
