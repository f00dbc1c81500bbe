"""Squeezing while training: what it is good for, and what one squeeze costs.

The comparison is of the runs in `training_runs.jsonl`, which `training_runs.py` makes in an hour or
two and which are kept; this makes their tables. The cost of a squeeze is measured anew.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from measure import Command
from measure import run as run_child
from report import Report, Row, Table, megabytes, seconds

HERE = Path(__file__).resolve().parent
RUNS = HERE / "training_runs.jsonl"
NAMES = {
    "tiny-llama": "the bundled tiny Llama (1.3 million parameters)",
    "gemma": "Gemma 3 270M, decoded from Q4_K_M, its vocabulary cut to the tokens of the text",
}
BUDGETS = {"steps": "equal steps", "flops": "arithmetic equal to that of the run at rank 64"}
ORDER = [
    "base", "source", "direct", "post", "post, calibrated by gram", "post, calibrated by diag",
    "cont", "in, equal steps", "in, steps by rank", "in, budgets", "in, alpha by root",
    "in, optimizer reset",
]  # fmt: skip
TEXT = """\
A LoRA on all linear layers learns a text (Proverbs and Ecclesiastes, King James version), from
rank 64 to rank 8 or 2, or at that rank from the start. *direct* trains at the target rank;
*source* at rank 64, for comparison; *post* squeezes *source* after its last step, *calibrated* by
second moments of inputs from the training text; *cont* squeezes once, a fifth before the end; *in*
lets the rank fall by halves in stages: of equal steps, of steps in proportion to the rank, with
budgets at each boundary (as many bytes as factors of one rank for all take, spread over modules),
with alpha in proportion to √r instead of r, or with an optimizer that starts anew at each boundary.
Alpha equals the first rank's number, so that the scale is 1. All else is alike: torch's AdamW
without decay, one curve of rates over the whole run (a tenth of warm-up, then a cosine), gradients
clipped at 1, float32. Each method has the highest rate that did best for it with the first seed on
one half of the held-out text. Losses are nats per token on the other half, mean ± standard
deviation over seeds; *against direct* is the mean difference of the same seeds ± its standard
deviation. A seed makes the first factors and the order of batches. CPU time is that of a run's own
steps: a beginning that runs share is counted at rank 64 alone. The seeds that a row has are in it;
where one rate was tried, or the best is the highest, a method may do better at another.
"""


def run(workdir: Path) -> Report:
    """Make the tables of the runs that are kept, and measure one squeeze."""
    lines = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
    tables = [
        table
        for model in NAMES
        for budget in BUDGETS
        if (table := losses(lines, model, budget)) is not None
    ]
    return Report("Squeezing while training", TEXT, [], [*tables, overhead(workdir)])


def losses(lines: list[dict[str, Any]], model: str, budget: str) -> Table | None:
    """Return the table of a model and a budget; None if nothing was run."""
    mine = [line for line in lines if line["model"] == model]
    if not any(line["budget"] == budget for line in mine):
        return None
    # What is squeezed after training at rank 64 has its steps and its arithmetic.
    found = {
        (line["method"], line["target"], line["rate"], line["seed"]): line
        for line in mine
        if line["budget"] == budget or line["method"].startswith(("base", "source", "post"))
    }
    rows = []
    for target in (0, 64, 8, 2):
        direct = chosen(found, "direct", target)
        for method in sorted({key[0] for key in found if key[1] == target}, key=ORDER.index):
            runs = chosen(found, method, target)
            rows.append(_row(method, target, runs, direct))
    setting = next(line for line in found.values() if line["method"] == "source")
    text = ", ".join(sorted({f"{rate:g}" for _, _, rate, _ in found if rate}))
    remark = f"Rates tried: {text}. A run at rank 64 has {setting['flops'] / 1e9:.3g} GFLOP."
    header = ["method", "rank", "rate", "seeds", "steps", "loss", "against direct", "CPU"]
    return Table(f"{NAMES[model]}: {BUDGETS[budget]}", header, rows, remark)


def chosen(
    found: dict[tuple[str, int, float, int], dict[str, Any]], method: str, target: int
) -> dict[int, dict[str, Any]]:
    """Return the runs of a method with its best rate, by seed."""
    mine = {key: line for key, line in found.items() if key[:2] == (method, target)}
    if not mine:
        return {}
    first = min(seed for *_, seed in mine)
    rates = {
        rate: line["choice_loss"] for (_, _, rate, seed), line in mine.items() if seed == first
    }
    best = min(rates, key=lambda rate: rates[rate])
    return {seed: line for (_, _, rate, seed), line in mine.items() if rate == best}


def _row(
    method: str, target: int, runs: dict[int, dict[str, Any]], direct: dict[int, dict[str, Any]]
) -> Row:
    values = [line["test_loss"] for line in runs.values()]
    pairs = [line["test_loss"] - direct[s]["test_loss"] for s, line in runs.items() if s in direct]
    line = next(iter(runs.values()))
    is_run = method != "base"
    times = [each["cpu_seconds"] for each in runs.values()] if is_run else []
    return Row(
        method,
        [
            str(target) if target else "–",
            f"{line['rate']:g}" if is_run else "–",
            str(len(runs)),
            str(line["steps"]) if is_run else "–",
            _spread(values),
            _spread(pairs, sign="+") if pairs and method != "direct" else "–",
            seconds(statistics.mean(times)) if times else "–",
        ],
    )


def _spread(values: Iterable[float], sign: str = "") -> str:
    given = list(values)
    mean = f"{statistics.mean(given):{sign}.3f}"
    return f"{mean} ± {statistics.stdev(given):.3f}" if len(given) > 1 else mean


def overhead(workdir: Path) -> Table:
    """Return what one squeeze of a live 7B-shaped adapter takes."""
    rows = []
    for optimizer in ("none", "adamw"):
        out = workdir / f"live-{optimizer}.json"
        script = str(HERE / "live_squeeze.py")
        run_child(Command([sys.executable, script, str(out), "--optimizer", optimizer]), workdir)
        made = json.loads(out.read_text(encoding="utf-8"))
        name = "with the state of AdamW" if optimizer == "adamw" else "without an optimizer"
        rows.append(
            Row(name, [seconds(made["cpu"]), seconds(made["wall"]), megabytes(made["peak"])])
        )
    remark = (
        "`squeeze_model(model, rank=16)`: all seven linears of 32 layers, bf16 factors of rank 64, "
        "one thread. The peak is of the whole process, factors and optimizer's state included."
    )
    return Table("One squeeze of a 7B-shaped adapter, 64 → 16", ["", "CPU", "wall", "peak memory"],
                 rows, remark)  # fmt: skip
