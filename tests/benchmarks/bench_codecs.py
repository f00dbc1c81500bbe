"""Decoding quantised weights beside the formats' own libraries, and beside a copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from codec_peers import FORMATS, IN, OUT
from report import Report, Row, Table, Target, ratio

HERE = Path(__file__).resolve().parent
TARGETS = {"FP8 blocks": 1.2, "INT4": 1.2, "INT8": 1.5, "MXFP4": 1.0, "NVFP4": 1.0}
TEXT = f"""\
One weight of {OUT} × {IN} in memory, one core, processor time, the best of several runs in
a process: decoded to 16 bits as `fuse` reads it, encoded with the old scales (MLX and
compressed-tensors: or new ones where nearer), decoded by the format's own library where it is
installed and runs on a CPU, and copied. GB/s are of the 16-bit values (tests/benchmarks/
codec_peers.py)."""


def _speeds() -> dict[str, dict[str, float | None]]:
    """Return GB/s by format and by what was timed."""
    found: dict[str, dict[str, float | None]] = {}
    for name in ["copy", *FORMATS]:
        whats = ["copy"] if name == "copy" else ["ours", "encode", "library"]
        found[name] = {what: _speed(what, name) for what in whats}
        print(f"  {name}: {found[name]}", file=sys.stderr)
    return found


def _speed(what: str, name: str) -> float | None:
    """Return what a process of its own measures; nothing is written, so no disk is waited for."""
    command = [sys.executable, str(HERE / "codec_peers.py"), what, name]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    speed: float | None = json.loads(printed)
    return speed


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _table(found: dict[str, dict[str, float | None]]) -> Table:
    copy = found["copy"]["copy"]
    rows = [
        Row(
            name,
            [
                _figure(speeds["ours"]),
                _figure(speeds["library"]),
                _figure(copy),
                _figure(speeds["encode"]),
            ],
        )
        for name, speeds in found.items()
        if name != "copy"
    ]
    header = ["format", "decoded, GB/s", "its library", "a copy", "encoded"]
    return Table("One weight, one core", header, rows)


def run(workdir: Path) -> Report:
    """Measure everything; writes nothing into `workdir`."""
    del workdir
    found = _speeds()
    targets = []
    for name, wanted in TARGETS.items():
        speed = found[name]["ours"] or 0.0
        met = speed >= wanted
        targets.append(
            Target(
                f"{name}: decoded at ≥ {wanted} GB/s",
                f"{speed:.2f} GB/s",
                met,
                "" if met else f"{ratio(wanted / speed)} too slow",
            )
        )
    return Report("Quantised bases", TEXT, targets, [_table(found)])
