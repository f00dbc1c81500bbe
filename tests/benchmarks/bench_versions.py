"""`loratools` as it is beside an earlier version of itself: no command may grow slower or larger.

The earlier version is a folder that `pip install --no-deps --target FOLDER` filled; its name is in
the environment variable LORATOOLS_BEFORE. Both run on the same interpreter and the same libraries.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from measure import Command, Timing, interleaved
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
VARIABLE = "LORATOOLS_BEFORE"
OUT = "versions-out"
ROUNDS = 5
SLOWER, LARGER = 1.05, 1.05  # differences below are those of two runs of one command
PROGRAM = "from loratools.cli import main; main()"
HEADER = ["command", "CPU before", "CPU now", "now ÷ before", "peak before", "peak now", "others"]
TEXT = """\
Each command runs as a child process with the code of an earlier version and with that of this
checkout, in turn, on one interpreter with the same libraries. Processor time of all threads counts,
least of the runs, since other work on the machine disturbs it less than the wall time; start-up,
reading, computing, checking, writing are in it. Squeeze and merge have the shapes of a 7B Llama,
fuse those of a 1B one with 1 GB of weights; all in bfloat16."""


def _inputs(workdir: Path) -> None:
    scripts: list[tuple[str, list[str]]] = [
        ("synthetic.py", ["v-squeeze", "--rank", "64", "--layers", "8"]),
        ("synthetic.py", ["v-first", "--rank", "16", "--layers", "8", "--seed", "1"]),
        ("synthetic.py", ["v-second", "--rank", "16", "--layers", "8", "--seed", "2"]),
        ("synthetic.py", ["v-ties1", "--rank", "16", "--layers", "1", "--seed", "1"]),
        ("synthetic.py", ["v-ties2", "--rank", "16", "--layers", "1", "--seed", "2"]),
        ("synthetic_base.py", ["v-base", "v-adapter", "--layers", "11"]),
    ]
    for script, arguments in scripts:
        if not (workdir / arguments[0]).exists():
            run_child(Command([sys.executable, str(HERE / script), *arguments]), workdir)


COMMANDS: dict[str, list[str]] = {
    "squeeze, rank 64 → 16, 8 layers": ["squeeze", "v-squeeze", "--rank", "16"],
    "squeeze, 99 % of the energy, 8 layers": ["squeeze", "v-squeeze", "--energy", "0.99"],
    "merge, linear, 2 × rank 16, 8 layers": ["merge", "v-first", "v-second", "--rank", "16"],
    "merge, TIES, 2 × rank 16, 1 layer": [
        *("merge", "v-ties1", "v-ties2", "--method", "ties", "--param", "density=0.5"),
        *("--rank", "16"),
    ],
    "fuse, rank 16 into 1 GB": ["fuse", "v-base", "v-adapter"],
    "info": ["info", "v-squeeze"],
}


def _pair(workdir: Path, arguments: list[str], before: str) -> dict[str, Timing]:
    def emptied() -> None:
        shutil.rmtree(workdir / OUT, ignore_errors=True)

    output = [] if arguments[0] == "info" else ["-o", OUT, "-q"]
    codes = {"before": before, "now": f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'formats'}"}
    commands = {
        name: Command(
            ["env", f"PYTHONPATH={code}", sys.executable, "-c", PROGRAM, *arguments, *output],
            emptied,
        )
        for name, code in codes.items()
    }
    found = interleaved(commands, workdir, ROUNDS)
    emptied()
    return found


def _row(name: str, pair: dict[str, Timing]) -> Row:
    before, now = pair["before"], pair["now"]
    return Row(
        name,
        [
            seconds(before.cpu),
            seconds(now.cpu),
            ratio(now.cpu / before.cpu),
            megabytes(before.peak_bytes),
            megabytes(now.peak_bytes),
            cores(now.other_cores),
        ],
    )


def _targets(name: str, pair: dict[str, Timing]) -> list[Target]:
    before, now = pair["before"], pair["now"]
    time, memory = now.cpu / before.cpu, now.peak_bytes / before.peak_bytes
    return [
        Target(
            f"{name}: no slower (by {SLOWER:.2f}×)",
            ratio(time),
            time <= SLOWER,
            "" if time <= SLOWER else f"{seconds(now.cpu - before.cpu)} more",
        ),
        Target(
            f"{name}: no more memory (by {LARGER:.2f}×)",
            ratio(memory),
            memory <= LARGER,
            "" if memory <= LARGER else f"{megabytes(now.peak_bytes - before.peak_bytes)} more",
        ),
    ]


def run(workdir: Path) -> Report:
    """Measure every command with both versions."""
    before = os.environ.get(VARIABLE)
    if not before:
        raise SystemExit(f"set {VARIABLE} to the folder of an installed earlier version")
    _inputs(workdir)
    pairs = {name: _pair(workdir, words, before) for name, words in COMMANDS.items()}
    targets = [target for name, pair in pairs.items() for target in _targets(name, pair)]
    names = [path.name for path in Path(before).glob("loratools-*.dist-info")]
    title = f"Against {names[0].removesuffix('.dist-info') if names else 'an earlier version'}"
    return Report(
        title,
        TEXT,
        targets,
        [Table("Both versions", HEADER, [_row(*each) for each in pairs.items()])],
    )
