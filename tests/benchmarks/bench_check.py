"""`loratools check`: the headers of many adapters, and the values of one."""

from __future__ import annotations

import sys
from pathlib import Path

from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
MANY, LIMIT, CORES = 1000, 10.0, 2
READS = 2.0
HEADER = ["what", "best", "median", "CPU", "peak memory", "others"]
READ = (
    "import sys, numpy, ml_dtypes; from safetensors.numpy import load_file; "
    "[value.astype(numpy.float32).sum() for value in load_file(sys.argv[1]).values()]"
)
TEXT = f"""\
`check --headers-only` of {MANY:,} PEFT folders, each with a configuration, a model card and 448
tensors named as those of a 7B Llama, and all rules of one adapter of rank 64 on all seven linears
of 32 layers. Whole commands are child processes, timed from outside; inputs are in the page cache.
The limit is for {CORES} cores that are free: where others keep them busy, CPU ÷ {CORES} counts."""


def run(workdir: Path, many: int = MANY, layers: int = 32) -> Report:
    """Run the benchmark; fewer adapters and layers are for trying it out."""
    folder = workdir / f"many-{many}"
    if not folder.exists():
        script = str(HERE / "many_adapters.py")
        run_child(Command([sys.executable, script, str(folder), str(many)]), workdir)
    one = workdir / f"check-r64-layers{layers}"
    if not one.exists():
        script = str(HERE / "synthetic.py")
        arguments = ["--rank", "64", "--layers", str(layers)]
        run_child(Command([sys.executable, script, str(one), *arguments]), workdir)
    check = [tool("loratools"), "check", "--fail-on=never", "--json"]
    headers = interleaved(
        {
            "two processes": Command([*check, str(folder), "--headers-only", f"--workers={CORES}"]),
            "one process": Command([*check, str(folder), "--headers-only", "--workers=1"]),
        },
        workdir,
        rounds=3,
    )
    values = interleaved(
        {
            "all rules": Command([*check, str(one)]),
            "headers": Command([*check, str(one), "--headers-only"]),
            "read": Command([sys.executable, "-c", READ, str(one / "adapter_model.safetensors")]),
        },
        workdir,
        rounds=3,
    )
    ours, limit = headers["two processes"], READS * values["read"].best + values["headers"].best
    counted = min(ours.best, ours.cpu / CORES)
    return Report(
        "Checking adapters",
        TEXT,
        [
            Target(
                f"headers of {many:,} adapters in under {seconds(LIMIT)} on {CORES} cores",
                f"{seconds(ours.best)} (CPU {seconds(ours.cpu)}, of each of {CORES} cores "
                f"{seconds(ours.cpu / CORES)})",
                counted <= LIMIT,
            ),
            Target(
                f"all rules, values included, take under {READS:g}× reading, plus the headers",
                f"{seconds(values['all rules'].best)}, limit {seconds(limit)} "
                f"({ratio(values['all rules'].best / values['read'].best)} of reading)",
                values["all rules"].best <= limit,
            ),
        ],
        [
            _table(f"Headers of {many:,} adapters", headers),
            _table("One adapter of rank 64, 7B shapes", values),
        ],
    )


def _table(title: str, timings: dict[str, Timing]) -> Table:
    rows = [
        Row(
            name,
            [
                seconds(timing.best),
                seconds(timing.median),
                seconds(timing.cpu),
                megabytes(timing.peak_bytes),
                cores(timing.other_cores),
            ],
        )
        for name, timing in timings.items()
    ]
    return Table(title, HEADER, rows)
