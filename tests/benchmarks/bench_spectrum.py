"""`loratools spectrum`, `compare` and `repair` on adapters shaped like a 7B Llama."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from measure import Command, Timing, interleaved, tool
from measure import run as run_child
from report import Report, Row, Table, Target, cores, megabytes, ratio, seconds

HERE = Path(__file__).resolve().parent
SHELF, SHELF_LIMIT = 100, 60.0
READS = 2.0
HEADER = ["what", "best", "median", "CPU", "peak memory", "others"]
READ = (
    "import sys, numpy, ml_dtypes; from safetensors.numpy import load_file; "
    "[value.astype(numpy.float32).sum() for value in load_file(sys.argv[1]).values()]"
)
TEXT = """\
`spectrum` of one adapter of rank 64 on all seven linears of 32 layers; `compare` of 100 adapters of
rank 16 on all of them, pairwise; intruder dimensions of an adapter of rank 64 on one weight of
2048×2048, with no decomposition kept, with it kept (`--cache`), and by PEFT's way: full SVDs of W
and W + ΔW. Whole commands are child processes, timed from outside; inputs are in the page cache."""


def run(workdir: Path, layers: int = 32, shelf: int = SHELF) -> Report:
    """Run the benchmark; fewer layers and adapters are for trying it out."""
    one = _adapter(workdir, 64, layers, 0)
    weights = one / "adapter_model.safetensors"
    spectrum = interleaved(
        {
            "ours": Command([tool("loratools"), "spectrum", str(one), "--json"]),
            "read": Command([sys.executable, "-c", READ, str(weights)]),
            "start": Command([tool("loratools"), "spectrum", "--help"]),
        },
        workdir,
        rounds=3,
    )
    many = [str(_adapter(workdir, 16, layers, seed)) for seed in range(shelf)]
    compare = interleaved(
        {"ours": Command([tool("loratools"), "compare", *many, "--json"])}, workdir, rounds=1
    )
    base, changed = workdir / "attention", workdir / "attention-lora"
    if not changed.exists():
        script = str(HERE / "intruder_peer.py")
        run_child(Command([sys.executable, script, "make", str(base), str(changed)]), workdir)
    cache = workdir / "svds"
    analysis = [tool("loratools"), "spectrum", str(changed), "--base", str(base), "--json"]
    shutil.rmtree(cache, ignore_errors=True)
    run_child(Command([*analysis, "--exact-svd", "--cache", str(cache)]), workdir)
    intruders = interleaved(
        {
            "bounds": Command(analysis),
            "exact": Command([*analysis, "--exact-svd"]),
            "cached": Command([*analysis, "--cache", str(cache)]),
            "PEFT's way": Command(
                [sys.executable, str(HERE / "intruder_peer.py"), "analyse", str(base), str(changed)]
            ),
        },
        workdir,
        rounds=1,
    )
    limit = READS * spectrum["read"].best + spectrum["start"].best
    ours, shelf_time = spectrum["ours"].best, compare["ours"].best
    slow = intruders["PEFT's way"].best
    return Report(
        "Spectral diagnostics",
        TEXT,
        [
            Target(
                f"`spectrum` takes under {READS:g}× reading, plus its start",
                f"{seconds(ours)}, limit {seconds(limit)}",
                ours <= limit,
            ),
            Target(
                f"{shelf} adapters are compared pairwise in under {seconds(SHELF_LIMIT)}",
                seconds(shelf_time),
                shelf_time <= SHELF_LIMIT,
            ),
            Target(
                "intruder analysis with a cached base is faster than without, and than PEFT's way",
                f"{ratio(intruders['exact'].best / intruders['cached'].best)}, "
                f"{ratio(slow / intruders['cached'].best)}",
                intruders["cached"].best < min(intruders["exact"].best, slow),
            ),
        ],
        [
            _table("Spectrum, rank 64", spectrum),
            _table(f"Comparison of {shelf} adapters, rank 16", compare),
            _table("Intruder dimensions of one weight of 2048×2048", intruders),
        ],
    )


def _adapter(workdir: Path, rank: int, layers: int, seed: int) -> Path:
    """Make an adapter unless an earlier run left it, in a child process to keep this one small."""
    folder = workdir / f"spectrum-r{rank}-layers{layers}-{seed}"
    if not (folder / "adapter_config.json").exists():  # which is written last
        arguments = ["--rank", str(rank), "--layers", str(layers), "--seed", str(seed)]
        script = str(HERE / "synthetic.py")
        run_child(Command([sys.executable, script, str(folder), *arguments]), workdir)
    return folder


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
