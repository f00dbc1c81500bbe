"""`loratools fuse` on sharded checkpoints, beside copying the same bytes and beside peers."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
OUT = "fused"
# Layers of 88 MB each: 1 GB and 4 GB.
SMALL, LARGE = 11, 45
ROUNDS = {SMALL: 7, LARGE: 3}
TARGET_COPY = {SMALL: 2.5, LARGE: 1.7}
TARGET_PEERS = 8
TARGET_PEAK_BYTES = 150e6
TARGET_GROWTH = 0.01
HEADER = ["what", "best", "median", "CPU", "peak memory", "others", "best ÷ ours"]
TEXT = """\
Llama shapes in bfloat16 (tests/benchmarks/synthetic_base.py), shards of four layers, an adapter of
rank 16 on all seven linears. Whole commands are child processes, timed from outside: start-up,
reading, computing, checking, writing. Ours flushes what it writes to the disk before it is done;
`cp -r` and the peers do not. Every input is in the page cache. Runs of what is compared are
interleaved, after one unmeasured run each, with all dirty pages flushed before each run; best and
median of the wall times, least CPU time of all threads, largest peak memory. "Others" is how many
cores other processes kept busy during the best run: where it is not near 0, the wall time is that
of a shared machine. MB are 10⁶ bytes."""


def _names(layers: int) -> tuple[str, str]:
    return f"base{layers}", f"adapter{layers}"


def _make(workdir: Path, layers: int) -> int:
    """Make both unless an earlier run left them; returns the size of the weights in bytes."""
    base, adapter = _names(layers)
    if not (workdir / adapter / "adapter_config.json").exists():  # which is written last
        script = str(HERE / "synthetic_base.py")
        run_child(
            Command([sys.executable, script, base, adapter, "--layers", str(layers)]), workdir
        )
    return sum(file.stat().st_size for file in (workdir / base).glob("*.safetensors"))


def _commands(workdir: Path, layers: int, *, peers: bool) -> dict[str, Command]:
    base, adapter = _names(layers)

    def clear() -> None:
        shutil.rmtree(workdir / OUT, ignore_errors=True)

    ours = [tool("loratools"), "fuse", base, adapter, "-o", OUT, "-q"]
    commands = {
        "ours": Command(ours, clear),
        "copy": Command(["cp", "-r", base, OUT], clear),
        "copy and flush": Command(["sh", "-c", f"cp -r {base} {OUT} && sync {OUT}/*"], clear),
    }
    if peers:
        script = str(HERE / "fuse_peers.py")
        for method in ("all", "shards"):
            arguments = [sys.executable, script, method, base, adapter, OUT]
            commands[method] = Command(arguments, clear)
    return commands


def _table(nbytes: int, timings: dict[str, Timing]) -> Table:
    names = {
        "ours": "**loratools fuse**",
        "copy": "cp -r",
        "copy and flush": "cp -r, then sync of its files",
        "all": "safetensors.torch: load all, add, save all",
        "shards": "safetensors.torch: shard by shard",
    }
    best = timings["ours"].best
    rows = [
        Row(
            names[key],
            [
                seconds(timing.best),
                seconds(timing.median),
                seconds(timing.cpu),
                megabytes(timing.peak_bytes),
                cores(timing.other_cores),
                ratio(timing.best / best),
            ],
        )
        for key, timing in timings.items()
    ]
    ours = timings["ours"]
    return Table(
        f"{megabytes(nbytes)} of weights",
        HEADER,
        rows,
        f"Ours: `{ours.command}`, {len(ours.samples)} runs, two workers.",
    )


def _within(nbytes: int, timings: dict[str, Timing], factor: float) -> Target:
    ours, copy, flushed = (timings[name] for name in ("ours", "copy", "copy and flush"))
    best, median = ours.best / copy.best, ours.median / copy.median
    met = best <= factor
    why = (
        f"Beside `cp -r` and a flush it takes {ratio(ours.best / flushed.best)} (medians "
        f"{ratio(ours.median / flushed.median)}); during the median run others kept "
        f"{cores(ours.middle.other_cores)} cores busy."
    )
    return Target(
        f"{megabytes(nbytes)}: within {factor}× of `cp -r`",
        f"{ratio(best)} (medians {ratio(median)})",
        met,
        "" if met and median <= factor else why,
    )


def _faster(name: str, peer: Timing, ours: Timing) -> Target:
    best, median = peer.best / ours.best, peer.median / ours.median
    met = best >= TARGET_PEERS
    why = f"Takes {seconds(ours.best)}, and may take {seconds(peer.best / TARGET_PEERS)}."
    return Target(
        f"≥ {TARGET_PEERS}× faster than {name}",
        f"{ratio(best)} (medians {ratio(median)})",
        met,
        "" if met and median >= TARGET_PEERS else why,
    )


def _memory(sizes: dict[int, int], timings: dict[int, Timing]) -> list[Target]:
    peak = max(timing.peak_bytes for timing in timings.values())
    growth = timings[LARGE].peak_bytes - timings[SMALL].peak_bytes
    input_growth = sizes[LARGE] - sizes[SMALL]
    met = growth <= TARGET_GROWTH * input_growth
    return [
        Target(
            f"peak memory at most {megabytes(TARGET_PEAK_BYTES)}",
            megabytes(peak),
            peak <= TARGET_PEAK_BYTES,
            "" if peak <= TARGET_PEAK_BYTES else f"{megabytes(peak - TARGET_PEAK_BYTES)} too much",
        ),
        Target(
            f"peak memory does not grow with the checkpoint (by under {TARGET_GROWTH:.0%} of its "
            "growth)",
            f"{megabytes(growth)} more peak for {megabytes(input_growth)} more input",
            met,
            "" if met else f"grows by {growth / input_growth:.1%} of the input's growth",
        ),
    ]


def run(workdir: Path) -> Report:
    """Measure everything; leaves its checkpoints in `workdir`."""
    sizes, timings = {}, {}
    for layers, rounds in ROUNDS.items():
        sizes[layers] = _make(workdir, layers)
        commands = _commands(workdir, layers, peers=layers == SMALL)
        timings[layers] = interleaved(commands, workdir, rounds)
    shutil.rmtree(workdir / OUT, ignore_errors=True)
    small = timings[SMALL]
    targets = [
        *(_within(sizes[n], timings[n], factor) for n, factor in TARGET_COPY.items()),
        _faster("load all, save all", small["all"], small["ours"]),
        _faster("shard by shard", small["shards"], small["ours"]),
        *_memory(sizes, {layers: found["ours"] for layers, found in timings.items()}),
    ]
    tables = [_table(sizes[layers], timings[layers]) for layers in ROUNDS]
    return Report("fuse: adapters into a sharded checkpoint", TEXT, targets, tables)
