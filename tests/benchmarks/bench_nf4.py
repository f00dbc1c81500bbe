"""`loratools quantize` and `dequantize` beside bitsandbytes on the CPU, and writing the bytes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
LAYERS, FEW_LAYERS = 4, 1
DIVISOR = 1
THREADS = 2
ROUNDS = 3
TARGET_QUANTIZE, TARGET_DEQUANTIZE, TARGET_WRITE = 8, 1, 1.5
TARGET_GROWTH = 0.01
HEADER = ["what", "best", "median", "CPU", "peak memory", "others", "best ÷ ours"]
TEXT = f"""\
A bf16 checkpoint of {LAYERS} layers with the shapes of a 7B Llama, one shard each
(tests/benchmarks/nf4_base.py), to NF4 with blocks of 64 and double quantisation, and back to bf16;
{THREADS} threads each. Whole commands are timed as for squeeze. "In memory" is the arithmetic
alone, timed inside its process, without import, reading or writing: of bitsandbytes its public
functions in torch's threads, of ours the codec with threads over weights. Ours also measures the
error of every weight, which bitsandbytes does not."""


def _base(workdir: Path, layers: int) -> Path:
    name = f"nf4-base-layers{layers}-divisor{DIVISOR}"
    if not (workdir / name / "config.json").exists():  # which is written last
        options = ["--layers", str(layers), "--divisor", str(DIVISOR)]
        run_child(Command([sys.executable, str(HERE / "nf4_base.py"), name, *options]), workdir)
    return workdir / name


def _ours(verb: str, source: Path, out: str) -> Command:
    target = source.with_name(out)
    arguments = [verb, source.name, "-o", out, "-q", "--workers", str(THREADS)]
    return Command(
        [tool("loratools"), *arguments], before=lambda: shutil.rmtree(target, ignore_errors=True)
    )


def _peer(mode: str, folder: Path, threads: int = THREADS) -> Command:
    arguments = [str(HERE / "nf4_peers.py"), mode, folder.name, "--threads", str(threads)]
    return Command([sys.executable, *arguments])


def _nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _write(folder: Path) -> Command:
    """Write as many bytes as a folder's weights have, flushed to the disk."""
    out = folder.with_name("written")
    count = -(-_nbytes(folder) // (8 << 20))
    return Command(
        ["dd", "if=/dev/zero", f"of={out.name}", "bs=8388608", f"count={count}", "conv=fsync"],
        before=lambda: out.unlink(missing_ok=True),
    )


def _inside(timing: Timing) -> list[float]:
    """Return what the runs of a peer printed: seconds of the arithmetic."""
    return sorted(json.loads(sample.stdout) for sample in timing.samples)


def _timed(name: str, timing: Timing, ours: float) -> Row:
    return Row(
        name,
        [
            seconds(timing.best),
            seconds(timing.median),
            seconds(timing.cpu),
            megabytes(timing.peak_bytes),
            cores(timing.other_cores),
            ratio(timing.best / ours),
        ],
    )


def _in_memory(name: str, timing: Timing, ours: float, nbytes: int) -> Row:
    found = _inside(timing)
    speed = f"{name}, {nbytes / found[0] / 1e9:.2f} GB/s"
    middle = found[len(found) // 2]
    cells = [seconds(found[0]), seconds(middle), "–", megabytes(timing.peak_bytes)]
    return Row(speed, [*cells, cores(timing.other_cores), ratio(found[0] / ours)])


def _at_least(wanted: str, value: float, limit: float) -> Target:
    met = value >= limit
    return Target(wanted, ratio(value), met, "" if met else f"{ratio(limit / value)} too slow")


def run(workdir: Path) -> Report:
    """Measure everything; leaves its checkpoints in `workdir`."""
    base, few = _base(workdir, LAYERS), _base(workdir, FEW_LAYERS)
    commands = {
        "quantize": _ours("quantize", base, "nf4"),
        "whole": _peer("bnb-whole", base),
        "bnb": _peer("bnb-quantize", base),
        "ours": _peer("our-quantize", base),
        "ours1": _peer("our-quantize", base, 1),
    }
    found = interleaved(commands, workdir, ROUNDS)
    four = base.with_name("nf4")
    small = interleaved({"few": _ours("quantize", few, "nf4-few")}, workdir, 1)["few"]
    run_child(_ours("dequantize", four, "plain"), workdir)
    commands = {
        "dequantize": _ours("dequantize", four, "plain"),
        "write": _write(base),
        "bnb": _peer("bnb-dequantize", four),
        "ours": _peer("our-dequantize", four),
        "ours1": _peer("our-dequantize", four, 1),
    }
    back = interleaved(commands, workdir, ROUNDS)
    nbytes = _nbytes(base)

    quantized, dequantized = found["quantize"], back["dequantize"]
    inside = {name: _inside(found[name])[0] for name in ("bnb", "ours", "ours1")}
    inside_back = {name: _inside(back[name])[0] for name in ("bnb", "ours", "ours1")}
    growth = quantized.peak_bytes - small.peak_bytes
    more = nbytes - _nbytes(few)
    write = dequantized.best / back["write"].best
    targets = [
        _at_least(
            f"quantize, whole command: ≥ {TARGET_QUANTIZE}× faster than load, bitsandbytes, save",
            found["whole"].best / quantized.best,
            TARGET_QUANTIZE,
        ),
        _at_least(
            f"quantize, in memory: ≥ {TARGET_QUANTIZE}× faster than bitsandbytes",
            inside["bnb"] / inside["ours"],
            TARGET_QUANTIZE,
        ),
        _at_least(
            "dequantize, in memory: no slower than bitsandbytes",
            inside_back["bnb"] / inside_back["ours"],
            TARGET_DEQUANTIZE,
        ),
        Target(
            f"dequantize, whole command: within {TARGET_WRITE}× of writing the same bytes",
            ratio(write),
            write <= TARGET_WRITE,
            "" if write <= TARGET_WRITE else f"{ratio(write / TARGET_WRITE)} of what it may take",
        ),
        Target(
            f"peak memory grows by under {TARGET_GROWTH:.0%} of what the input grows by",
            f"{megabytes(max(growth, 0))} more peak for {megabytes(more)} more input",
            growth <= TARGET_GROWTH * more,
            "" if growth <= TARGET_GROWTH * more else "it grows",
        ),
    ]
    ours = quantized.best
    rows = [
        _timed("**loratools quantize**", quantized, ours),
        _timed("load, bitsandbytes, save", found["whole"], ours),
        _in_memory("bitsandbytes in memory", found["bnb"], ours, nbytes),
        _in_memory("our codec in memory", found["ours"], ours, nbytes),
        _in_memory("our codec in memory, one thread", found["ours1"], ours, nbytes),
    ]
    ours = dequantized.best
    rows_back = [
        _timed("**loratools dequantize**", dequantized, ours),
        _timed("writing as many bytes: dd conv=fsync", back["write"], ours),
        _in_memory("bitsandbytes in memory", back["bnb"], ours, nbytes),
        _in_memory("our codec in memory", back["ours"], ours, nbytes),
        _in_memory("our codec in memory, one thread", back["ours1"], ours, nbytes),
    ]
    size = megabytes(nbytes)
    tables = [
        Table(f"quantize, {size} to NF4", HEADER, rows, "GB/s are of the 16-bit side."),
        Table(f"dequantize, NF4 to {size}", HEADER, rows_back),
    ]
    return Report("nf4", TEXT, targets, tables)
