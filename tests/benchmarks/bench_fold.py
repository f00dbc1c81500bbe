"""`loratools to-lora` on a DoRA of one large layer, beside forming its change and a dense SVD."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
OUT, IN, RANK = 4096, 11008, 16
RANKS = (16, 64)
TARGET_SPEED, TARGET_EXCESS = 5, 0.01
HEADER = ["what", "best", "median", "CPU", "peak memory", "others", "best ÷ ours", "error"]
TEXT = f"""\
One DoRA of rank {RANK} on a bf16 weight of {OUT} by {IN}, a layer of a 7B Llama, made of random
numbers with magnitudes one percent off; whole commands, as for squeeze. The dense way forms the
change in float32 and decomposes it with NumPy; its error is the least possible for the rank."""


def _made(workdir: Path) -> None:
    if not (workdir / "dora").exists():
        sizes = [str(OUT), str(IN), str(RANK)]
        run_child(Command([sys.executable, str(HERE / "fold_peer.py"), "make", *sizes]), workdir)


def run(workdir: Path) -> Report:
    """Time both ways at each rank."""
    _made(workdir)
    dense = Command([sys.executable, str(HERE / "fold_peer.py"), "dense", *map(str, RANKS)])
    peer = Timing(dense, [run_child(dense, workdir)])
    optima: dict[str, float] = json.loads(peer.samples[0].stdout)
    rows, targets = [], []
    for rank in RANKS:
        out = workdir / "plain"
        arguments = ["to-lora", "dora", "--base", "base", "-o", out.name, "--rank", str(rank)]
        ours = Command(
            [tool("loratools"), *arguments, "--json"],
            before=lambda out=out: shutil.rmtree(out, ignore_errors=True),
        )
        timing = interleaved({"ours": ours}, workdir, 3)["ours"]
        error = json.loads(timing.samples[0].stdout)["relative_error"]
        excess = error / optima[str(rank)] - 1.0
        for name, found, value in (
            (f"`{ours}`", timing, error),
            (f"dense SVD, rank {rank}", peer, optima[str(rank)]),
        ):
            cells = [
                seconds(found.best),
                seconds(found.median),
                seconds(found.cpu),
                megabytes(found.peak_bytes),
                cores(found.other_cores),
                ratio(found.best / timing.best),
                f"{value:.5f}",
            ]
            rows.append(Row(name, cells))
        targets.append(
            Target(
                f"rank {rank}: {TARGET_SPEED}× faster than the dense SVD, error within 1 %, and "
                "less memory",
                f"{peer.best / timing.best:.0f}×, {100 * excess:.2f} % above, "
                f"{megabytes(timing.peak_bytes)} against {megabytes(peer.peak_bytes)}",
                peer.best >= TARGET_SPEED * timing.best
                and excess <= TARGET_EXCESS
                and timing.peak_bytes < peer.peak_bytes,
            )
        )
    title = "DoRA to LoRA, streamed"
    return Report(title, TEXT, targets, [Table(f"{OUT} × {IN}", HEADER, rows)])
