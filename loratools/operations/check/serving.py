"""Rules about serving programs: what they refuse, and what they leave out without an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loratools.operations.check.remedy import Remedy
from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import CONFIG_FILE, Subject
from loratools.operations.check.targets import Support, Target
from loratools_formats.core.adapter import Adapter, ModuleChange

OfTarget = Callable[[Subject, Adapter, Target], Iterator[Found]]
_WORDS: dict[Support, str] = {
    "refused": "refuses", "ignored": "silently leaves out", "yes": "", "unknown": "",
}  # fmt: skip


def _each(rule: OfTarget) -> Callable[[Subject], Iterator[Found]]:
    """Return a rule that asks about every target, of an adapter that could be read."""

    def check(subject: Subject) -> Iterator[Found]:
        for target in subject.targets:
            if subject.adapter is not None and not target.retired:
                yield from rule(subject, subject.adapter, target)

    return check


def _retired(subject: Subject) -> Iterator[Found]:
    for target in subject.targets:
        if target.retired:
            yield Found(f"{target.label}: {target.retired}", target=target.name)


def _unusable(
    target: Target,
    support: Support,
    what: str,
    names: list[str],
    remedy: Remedy | None = None,
    hint: str = "",
) -> Iterator[Found]:
    """Yield that a target refuses or leaves out some parts, if it does and there are any."""
    if names and _WORDS[support]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        text = f"{target.label} {_WORDS[support]} {what}: {names[0]}{more}"
        yield Found(text, names[0], remedy=remedy, target=target.name, hint=hint)


def _modules(adapter: Adapter, holds: Callable[[ModuleChange], bool]) -> list[str]:
    return [name for name, change in adapter.modules.items() if holds(change)]


def _format(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if adapter.format not in target.formats:
        text = f"{target.label} loads {' or '.join(target.formats)}, and this is {adapter.format}"
        base = target.formats[0] == "gguf" or adapter.format == "gguf"
        yield Found(text, remedy=Remedy("format", target.formats[0], base), target=target.name)


def _kind(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if "*" in target.kinds:
        return
    other = _modules(adapter, lambda change: change.kind not in target.kinds)
    kinds = ", ".join(sorted({adapter.modules[name].kind for name in other}))
    remedy = Remedy("plain", base=any(adapter.modules[name].is_dora for name in other))
    yield from _unusable(target, target.other_kinds, f"changes of kind {kinds}", other, remedy)


def _ranks(adapter: Adapter) -> dict[str, int]:
    return {n: c.rank for n, c in adapter.modules.items() if c.rank is not None}


def _rank(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    ranks = _ranks(adapter)
    if not ranks:
        return
    largest = max(ranks, key=lambda name: ranks[name])
    limit = max(target.ranks, default=None)
    if limit is not None and ranks[largest] > limit:
        text = f"{target.label} takes ranks up to {limit}, and {largest} has {ranks[largest]}"
        yield Found(text, largest, remedy=Remedy("rank", limit), target=target.name)
    least = min(ranks, key=lambda name: ranks[name])
    if ranks[least] < target.least_rank:
        text = (
            f"{target.label} takes ranks from {target.least_rank}, and {least} has {ranks[least]}"
        )
        remedy = Remedy("uniform", max(target.least_rank, ranks[largest]))
        yield Found(text, least, remedy=remedy, target=target.name)


def _rank_flag(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    largest = max(_ranks(adapter).values(), default=0)
    if target.default_rank is None or largest <= target.default_rank:
        return
    fitting = min((rank for rank in target.ranks if rank >= largest), default=None)
    if fitting is not None:
        text = f"{target.label} must be started with {target.rank_flag} {fitting} or more"
        hint = f"Start it with {target.rank_flag} {fitting}; its default is {target.default_rank}"
        yield Found(text, target=target.name, hint=hint)


def _scale(subject: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    """Compare each scale with the one that a program would take for all modules."""
    scales = {n: c.factors.scale for n, c in adapter.modules.items() if c.factors is not None}
    if target.scales != "one" or not scales:
        return
    if "peft" not in target.formats:
        if len(set(scales.values())) > 1:
            least = min(scales, key=lambda name: scales[name])
            what = f"scales that differ, here {scales[least]:g} to {max(scales.values()):g}"
            yield from _unusable(target, "refused", what, [least], _uniform(adapter))
        return
    one = _one_scale(subject.config, target) if adapter.format == "peft" else None
    wrong = [name for name, scale in scales.items() if scale != one]
    if one is not None and wrong:
        text = (
            f"{target.label} multiplies every module by {one:g} and silently leaves out the "
            f"patterns: {wrong[0]} has {scales[wrong[0]]:g}, as {len(wrong)} of {len(scales)} "
            "modules have another"
        )
        yield Found(text, wrong[0], CONFIG_FILE, remedy=_uniform(adapter), target=target.name)


def _one_scale(config: Mapping[str, Any], target: Target) -> float | None:
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or not isinstance(alpha, int | float) or r <= 0:
        return None
    return (
        alpha / math.sqrt(r) if config.get("use_rslora") and target.rslora == "yes" else alpha / r
    )


def _uniform(adapter: Adapter) -> Remedy:
    return Remedy("uniform", max(_ranks(adapter).values(), default=1))


def _mixed_ranks(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    ranks = _ranks(adapter)
    if len(set(ranks.values())) < 2:
        return
    least = min(ranks, key=lambda name: ranks[name])
    what = f"ranks that differ, here {min(ranks.values())} to {max(ranks.values())}"
    yield from _unusable(target, target.mixed_ranks, what, [least], _uniform(adapter))


def _rslora(subject: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if subject.config.get("use_rslora"):
        what = "rank-stabilised scales"
        yield from _unusable(target, target.rslora, what, ["use_rslora"], _uniform(adapter))


_FUSE = "Fuse the adapter into its base instead: loratools fuse BASE ADAPTER -o FUSED"


def _replacements(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    whole = [
        r.target for r in adapter.replacements.values() if r.kind not in ("bias", "token_rows")
    ]
    rows = [r.target for r in adapter.replacements.values() if r.kind == "token_rows"]
    what = "whole tensors in place of the base's"
    yield from _unusable(target, target.replacements, what, whole, hint=_FUSE)
    yield from _unusable(target, target.token_rows, "trained token rows", rows, hint=_FUSE)


def _biases(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    names = [r.target for r in adapter.replacements.values() if r.kind == "bias"]
    names += [addition.target for addition in adapter.additions.values()]
    names += [n for n, c in adapter.modules.items() if c.factors and c.factors.bias is not None]
    yield from _unusable(target, target.biases, "trained biases", names, hint=_FUSE)


def _layers(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    kinds: tuple[tuple[str, Support, str], ...] = (
        ("embedding", target.embeddings, "factors of embeddings"),
        ("experts", target.experts, "factors of stacked experts"),
        ("conv", target.convolutions, "factors of convolutions"),
    )
    for kind, support, what in kinds:
        names = [n for n, change in adapter.modules.items() if change.layer.kind == kind]
        yield from _unusable(target, support, what, names, hint=_FUSE)


def _module_names(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if not target.modules:
        return
    other = [name for name in adapter.modules if name.rpartition(".")[2] not in target.modules]
    yield from _unusable(target, "refused", "modules of these names", other, hint=_FUSE)


def _pickles(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if not adapter.inputs or adapter.format != "peft":
        return
    name = adapter.inputs[0].path.name
    if name.endswith(".bin"):
        remedy = Remedy("rewrite", "peft")
        yield from _unusable(target, target.pickles, "pickled weights", [name], remedy)


RULES = (
    Rule(
        "LT501", "target-retired", "error",
        "The program does not load adapters any more.",
        "Nothing that is done to the adapter changes that.",
        "Fuse it into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        _retired,
    ),
    Rule(
        "LT502", "target-format", "error",
        "The program does not load this format.",
        "It fails, or looks for other files in the folder.",
        "Convert it: `loratools convert ADAPTER -o NEW --to FORMAT`.",
        "targets.toml",
        _each(_format),
    ),
    Rule(
        "LT503", "target-kind", "error",
        "The program does not apply adapters of this kind.",
        "Most check the kind, and some apply the factors without the rest.",
        "Make it a plain LoRA: `loratools to-lora ADAPTER --base MODEL --rank R -o PLAIN`.",
        "targets.toml",
        _each(_kind),
    ),
    Rule(
        "LT504", "target-rank", "error",
        "A rank is larger or smaller than the program can take.",
        "It refuses the adapter.",
        "Cut it with the least error: `loratools squeeze ADAPTER -o NEW --rank R`.",
        "targets.toml",
        _each(_rank),
    ),
    Rule(
        "LT505", "target-flag", "note",
        "The program takes this rank with a flag only.",
        "It refuses the adapter otherwise.",
        "Start it with the flag, or squeeze the adapter.",
        "targets.toml",
        _each(_rank_flag),
    ),
    Rule(
        "LT506", "scale-dropped", "error",
        "The program reads one scale for all modules, and some have another.",
        "It passes over alpha_pattern and rank_pattern: the module loads and acts too strongly or "
        "too weakly.",
        "Give all modules one rank and scale without loss: "
        "`loratools squeeze ADAPTER -o NEW --uniform --rank R`.",
        "`PEFTHelper.from_dict` in vLLM; `get_scaling_factor` in LoRAX",
        _each(_scale),
    ),
    Rule(
        "LT507", "mixed-ranks", "error",
        "The program cannot take modules of different ranks.",
        "It fails, or reads the factors with the wrong rank.",
        "Pad them: `loratools squeeze ADAPTER -o NEW --uniform --rank R`.",
        "targets.toml",
        _each(_mixed_ranks),
    ),
    Rule(
        "LT508", "rslora-dropped", "error",
        "The program passes over use_rslora.",
        "Every module acts too weakly by √r.",
        "Write plain scales: `loratools squeeze ADAPTER -o NEW --uniform --rank R`.",
        "targets.toml",
        _each(_rslora),
    ),
    Rule(
        "LT509", "target-replacements", "error",
        "The program does not take whole tensors or token rows.",
        "It refuses them, or goes on with the base's.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        _each(_replacements),
    ),
    Rule(
        "LT510", "target-biases", "error",
        "The program does not take trained biases.",
        "It refuses them, or goes on with the base's.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        _each(_biases),
    ),
    Rule(
        "LT511", "target-layers", "error",
        "The program does not take factors of this kind of layer.",
        "It refuses them, or leaves them out.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        _each(_layers),
    ),
    Rule(
        "LT512", "target-modules", "error",
        "The program adapts modules of certain names only.",
        "It refuses others.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        _each(_module_names),
    ),
    Rule(
        "LT513", "target-pickles", "error",
        "The program does not load pickled weights.",
        "It refuses the adapter.",
        "Store them as safetensors: `loratools convert ADAPTER -o NEW --to peft`.",
        "targets.toml",
        _each(_pickles),
    ),
)  # fmt: skip
