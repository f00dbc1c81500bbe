"""Fusing into a base of four bits beside copying it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from measure import Command, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
LAYERS = 41
TEXT = f"""\
A checkpoint of {LAYERS} layers with the shapes of a 1.1B Llama in MLX's four bits
(tests/benchmarks/synthetic_four_bits.py), and an adapter of rank 16 on all of its linears; whole
commands with one worker beside `cp -r`, processor time of one run each. By default every changed
weight is stored in 16 bits, which is four times as much to write."""


def run(workdir: Path) -> Report:
    """Measure everything; leaves its checkpoint in `workdir`."""
    base, adapter, out = (workdir / name for name in ("c-base", "c-adapter", "c-out"))
    if not (adapter / "adapter_config.json").exists():
        script = str(HERE / "synthetic_four_bits.py")
        arguments = [sys.executable, script, base.name, adapter.name, "--layers", str(LAYERS)]
        run_child(Command(arguments), workdir)

    def clear() -> None:
        shutil.rmtree(out, ignore_errors=True)

    fuse = [tool("loratools"), "fuse", base.name, adapter.name, "-o", out.name, "-q"]
    one = [*fuse, "--workers", "1"]
    commands = {
        "cp -r": Command(["cp", "-r", base.name, out.name], clear),
        "fuse, changed weights in 16 bits": Command(one, clear),
        "fuse --requantize": Command([*one, "--requantize", "--allow-lossy"], clear),
        "fuse --changed-bits 8": Command([*one, "--changed-bits", "8"], clear),
    }
    timings = interleaved(commands, workdir, 1)
    clear()
    copy = timings["cp -r"].cpu
    rows = [
        Row(
            name,
            [
                seconds(timing.cpu),
                megabytes(timing.peak_bytes),
                cores(timing.other_cores),
                ratio(timing.cpu / copy),
            ],
        )
        for name, timing in timings.items()
    ]
    nbytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    header = ["what", "CPU", "peak memory", "others", "CPU ÷ cp"]
    table = Table(f"Into {megabytes(nbytes)} of four bits", header, rows)
    return Report("Fusing into four bits", TEXT, [], [table])
