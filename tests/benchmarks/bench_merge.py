"""`loratools merge` on adapters shaped like a 7B Llama, beside PEFT's dense way and copying."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
LAYERS = 32
TIES_LAYERS = 2
WEIGHTS = "adapter_model.safetensors"
# One module of each shape, how many a layer has of it.
MODULES = {"self_attn.q_proj": 4, "mlp.up_proj": 2, "mlp.down_proj": 1}
# Full SVDs of the long shapes take over a minute: timed with both sides halved, counted as 2³.
HALVED = ("mlp.up_proj", "mlp.down_proj")
CASES = {"2 × rank 16": (2, 16), "4 × rank 16": (4, 16), "2 × rank 64": (2, 64)}
TARGET_LINEAR, TARGET_PEAK_BYTES = 300, 1e9
HEADER = ["what", "best", "median", "CPU", "peak memory", "others", "best ÷ ours"]
TEXT = f"""\
All seven linears of {LAYERS} layers, bf16, as for squeeze, which see for how times are taken.
PEFT's `add_weighted_adapter` is timed on one module of each shape of one layer and multiplied by
the number of modules: forming and combining the dense ΔW in float32 and a full SVD, as it does,
with its own functions, without import, reading or writing. Our TIES streams over every entry
several times; it is timed on {TIES_LAYERS} layers as a whole command and multiplied, and the peak
memory is that of the whole command, which does not depend on the number of layers."""


def _adapter(workdir: Path, rank: int, seed: int, layers: int) -> Path:
    name = f"m-r{rank}-seed{seed}-layers{layers}"
    if not (workdir / name / "adapter_config.json").exists():
        options = ["--rank", str(rank), "--seed", str(seed), "--layers", str(layers)]
        run_child(Command([sys.executable, str(HERE / "synthetic.py"), name, *options]), workdir)
    return workdir / name


def _merge(adapters: list[Path], *options: str) -> Command:
    out = adapters[0].with_name("merged")
    names = [adapter.name for adapter in adapters]
    return Command(
        [tool("loratools"), "merge", *names, "-o", out.name, "-q", *options],
        before=lambda: shutil.rmtree(out, ignore_errors=True),
    )


def _copy(adapters: list[Path]) -> Command:
    folder = adapters[0].with_name("copies")

    def emptied() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    return Command(["cp", "-r", *(adapter.name for adapter in adapters), folder.name], emptied)


def _peer(
    combination: str, adapters: list[Path], *options: str
) -> tuple[dict[str, list[float]], float]:
    """Return seconds (combination, SVD) by module, scaled to full size, and the peak memory."""
    script = str(HERE / "merge_peers.py")
    names = [adapter.name for adapter in adapters]
    modules = ["--modules", *MODULES]
    arguments = [script, combination, *names, *modules, *options]
    sample = run_child(Command([sys.executable, *arguments]), adapters[0].parent)
    times: dict[str, list[float]] = json.loads(sample.stdout)
    if "--halve" in options:
        for module in HALVED:
            times[module] = [4 * times[module][0], 8 * times[module][1]]
    return times, sample.peak_bytes


def _all_layers(times: dict[str, list[float]], part: int) -> float:
    return LAYERS * sum(MODULES[module] * found[part] for module, found in times.items())


def _timed(name: str, timing: Timing, ours: float, factor: int = 1) -> Row:
    return Row(
        name,
        [
            seconds(factor * timing.best),
            seconds(factor * timing.median),
            seconds(factor * timing.cpu),
            megabytes(timing.peak_bytes),
            cores(timing.other_cores),
            ratio(factor * timing.best / ours),
        ],
    )


def _peer_row(name: str, total: float, peak: float, ours: float) -> Row:
    return Row(name, [seconds(total), "–", "–", megabytes(peak), "–", ratio(total / ours)])


def _linear(workdir: Path, svd: float, peak: float) -> tuple[list[Table], list[Target]]:
    tables, targets = [], []
    for name, (count, rank) in CASES.items():
        adapters = [_adapter(workdir, rank, seed, LAYERS) for seed in range(count)]
        commands = {
            "exact": _merge(adapters),
            "squeezed": _merge(adapters, "--rank", str(rank)),
            "copy": _copy(adapters),
        }
        timings = interleaved(commands, workdir, 3)
        ours = timings["squeezed"].best
        rows = [
            _timed(f"**loratools merge --rank {rank}**", timings["squeezed"], ours),
            _timed("loratools merge, all ranks kept", timings["exact"], ours),
            _peer_row("PEFT, svd; scaled", svd, peak, ours),
            _timed("copy of the inputs: cp -r", timings["copy"], ours),
        ]
        tables.append(Table(f"linear, {name}", HEADER, rows))
        targets.append(
            Target(
                f"linear, {name}: ≥ {TARGET_LINEAR}× faster than PEFT's svd",
                ratio(svd / ours),
                svd / ours >= TARGET_LINEAR,
                "" if svd / ours >= TARGET_LINEAR else f"{seconds(ours)} of our own",
            )
        )
    return tables, targets


def run(workdir: Path) -> Report:
    """Measure everything; leaves its adapters in `workdir`."""
    two = [_adapter(workdir, 16, seed, LAYERS) for seed in range(2)]
    four = [_adapter(workdir, 16, seed, LAYERS) for seed in range(4)]
    svd_times, svd_peak = _peer("svd", two, "--halve", *HALVED)
    svd = _all_layers(svd_times, 1)
    linear = _all_layers(svd_times, 0) + svd
    tables, targets = _linear(workdir, linear, svd_peak)
    ties_times, ties_peak = _peer("ties_svd", four, "--no-svd")
    dense = _all_layers(ties_times, 0) + svd
    few = [_adapter(workdir, 16, seed, TIES_LAYERS) for seed in range(4)]
    options = ["--method", "ties", "--density", "0.2", "--rank", "16"]
    timing = interleaved({"ties": _merge(few, *options)}, workdir, 1)["ties"]
    factor = LAYERS // TIES_LAYERS
    ours = factor * timing.best
    rows = [
        _timed(
            f"**loratools merge --method ties**; {TIES_LAYERS} layers, scaled", timing, ours, factor
        ),
        _peer_row("PEFT, ties_svd; scaled", dense, max(ties_peak, svd_peak), ours),
    ]
    remark = (
        f"Of PEFT's time {seconds(_all_layers(ties_times, 0))} is TIES and {seconds(svd)} the full "
        f"SVD. Its peak is that of one module: TIES on whole ones {megabytes(ties_peak)}."
    )
    tables.append(Table("ties, 4 × rank 16 → 16, density 0.2", HEADER, rows, remark))
    targets.append(
        Target(
            f"ties, 4 × rank 16: peak memory under {megabytes(TARGET_PEAK_BYTES)}",
            f"{megabytes(timing.peak_bytes)} (dense {megabytes(ties_peak)})",
            timing.peak_bytes < TARGET_PEAK_BYTES,
            "" if timing.peak_bytes < TARGET_PEAK_BYTES else "too much",
        )
    )
    return Report("merge", TEXT, targets, tables)
