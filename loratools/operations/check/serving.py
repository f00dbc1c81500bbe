"""Rules about serving programs: what they refuse, and what they leave out without an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from loratools.operations.check.kohya_names import about_alphas
from loratools.operations.check.remedy import Remedy
from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.subject import Subject
from loratools.operations.check.targets import Support, Target
from loratools_formats.contract.commands import FUSE_INSTEAD
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.factors import scale_of
from loratools_formats.core.file_names import ADAPTER_CONFIG
from loratools_formats.disk.errors import and_more

OfTarget = Callable[[Subject, Adapter, Target], Iterator[Found]]
WORDS: dict[Support, str] = {
    "refused": "refuses", "ignored": "silently leaves out", "yes": "", "unknown": "",
}  # fmt: skip


def each_target(rule: OfTarget) -> Callable[[Subject], Iterator[Found]]:
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


def unusable(
    target: Target,
    support: Support,
    what: str,
    names: list[str],
    remedy: Remedy | None = None,
    hint: str = "",
) -> Iterator[Found]:
    """Yield that a target refuses or leaves out some parts, if it does and there are any."""
    if names and WORDS[support]:
        text = f"{target.label} {WORDS[support]} {what}: {and_more(names)}"
        yield Found(text, names[0], remedy=remedy, target=target.name, hint=hint)


def _modules(adapter: Adapter, holds: Callable[[ModuleChange], bool]) -> list[str]:
    return [name for name, change in adapter.modules.items() if holds(change)]


def _format(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if adapter.format not in target.formats:
        text = f"{target.label} loads {' or '.join(target.formats)}, and this is {adapter.format}"
        base = target.formats[0] == "gguf" or adapter.format == "gguf"
        yield Found(text, remedy=Remedy("format", target.formats[0], base), target=target.name)


def _kind(subject: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if "*" in target.kinds:
        return
    other = _modules(adapter, lambda change: change.kind not in target.kinds)
    doras = [name for name in other if adapter.modules[name].kind == "dora"]
    others = [name for name in other if name not in set(doras)]
    what = "the magnitudes of DoRA"
    yield from unusable(target, target.dora, what, doras, Remedy("plain", base=True))
    if subject.is_peft and subject.config.get("peft_type") == "LORA":
        return  # a variant of LoRA, by a setting: `target-settings` tells
    kinds = ", ".join(sorted({adapter.modules[name].kind for name in others}))
    remedy = Remedy("plain", base=any(adapter.modules[name].is_dora for name in others))
    yield from unusable(target, target.other_kinds, f"changes of kind {kinds}", others, remedy)


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
    """Compare each scale with the one that a program would take."""
    parts = adapter.factors()
    scales = {name: part.scale for name, part in parts.items()}
    if not scales:
        return
    of_others = about_alphas(adapter, target)
    if of_others is not None:
        yield of_others
        return
    if target.scales in ("own", "unknown"):
        return
    if target.scales == "one" and "peft" not in target.formats:
        if len(set(scales.values())) > 1:
            least = min(scales, key=lambda name: scales[name])
            what = f"scales that differ, here {scales[least]:g} to {max(scales.values()):g}"
            yield from unusable(target, "refused", what, [least], _uniform(adapter))
        return
    taken = _taken_scales(subject, {name: part.rank for name, part in parts.items()}, target)
    wrong = [name for name in taken if not math.isclose(scales[name], taken[name], rel_tol=1e-6)]
    if wrong:
        first = wrong[0]
        text = (
            f"{target.label} multiplies {first} by {taken[first]:g} instead of {scales[first]:g}, "
            f"and takes another scale than PEFT for {len(wrong)} of {len(scales)} modules"
        )
        file = ADAPTER_CONFIG if adapter.format == "peft" else None
        yield Found(text, first, file, remedy=_uniform(adapter), target=target.name)


def _taken_scales(subject: Subject, ranks: Mapping[str, int], target: Target) -> dict[str, float]:
    """Return the scale that a program gives each module; empty if nobody can tell."""
    config = subject.config
    r, alpha = config.get("r"), config.get("lora_alpha")
    if target.scales == "first":
        states = subject.adapter is None or subject.is_peft or _states_scales(subject.adapter)
        first = next(iter(ranks.values()))
        return {} if states else {name: first / ranks[name] for name in ranks}
    if not subject.is_peft or not isinstance(r, int) or r <= 0:
        return {}
    dropped = bool(config.get("use_rslora")) and target.rslora == "ignored"
    if not isinstance(alpha, int | float) or dropped:  # of the latter `rslora-dropped` tells
        return {}
    root = bool(config.get("use_rslora")) and target.rslora == "yes"
    divisors = {name: ranks[name] if target.scales == "alpha" else r for name in ranks}
    return {name: scale_of(alpha, n, is_rooted=root) for name, n in divisors.items()}


def _states_scales(adapter: Adapter) -> bool:
    """Return whether a single file has alphas, or the configuration that diffusers writes."""
    parts = [change.factors for change in adapter.modules.values() if change.factors is not None]
    alphas = any(part.alpha_tensor is not None for part in parts)
    return alphas or any(key.endswith("lora_adapter_metadata") for key in adapter.metadata)


def _uniform(adapter: Adapter) -> Remedy:
    return Remedy("uniform", max(_ranks(adapter).values(), default=1))


def _mixed_ranks(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    ranks = _ranks(adapter)
    if len(set(ranks.values())) < 2:
        return
    least = min(ranks, key=lambda name: ranks[name])
    what = f"ranks that differ, here {min(ranks.values())} to {max(ranks.values())}"
    yield from unusable(target, target.mixed_ranks, what, [least], _uniform(adapter))


def _rslora(subject: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if subject.config.get("use_rslora"):
        what = "rank-stabilised scales"
        yield from unusable(target, target.rslora, what, ["use_rslora"], _uniform(adapter))


def _replacements(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    whole = [
        r.target for r in adapter.replacements.values() if r.kind not in ("bias", "token_rows")
    ]
    whole = [name for name in whole if not set(name.split(".")) & set(target.replaceable)]
    rows = [r.target for r in adapter.replacements.values() if r.kind == "token_rows"]
    what = "whole tensors in place of the base's"
    yield from unusable(target, target.replacements, what, whole, hint=FUSE_INSTEAD)
    yield from unusable(target, target.token_rows, "trained token rows", rows, hint=FUSE_INSTEAD)


def _biases(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    names = [r.target for r in adapter.replacements.values() if r.kind == "bias"]
    names += [addition.target for addition in adapter.additions.values()]
    names += [n for n, c in adapter.modules.items() if c.factors and c.factors.bias is not None]
    yield from unusable(target, target.biases, "trained biases", names, hint=FUSE_INSTEAD)


def _layers(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    kinds: tuple[tuple[str, Support, str], ...] = (
        ("embedding", target.embeddings, "factors of embeddings"),
        ("experts", target.experts, "factors of stacked experts"),
        ("conv", target.convolutions, "factors of convolutions"),
    )
    for kind, support, what in kinds:
        names = [n for n, change in adapter.modules.items() if change.layer.kind == kind]
        yield from unusable(target, support, what, names, hint=FUSE_INSTEAD)


def _module_names(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if not target.modules:
        return
    other = [name for name in adapter.modules if name.rpartition(".")[2] not in target.modules]
    yield from unusable(target, "refused", "modules of these names", other, hint=FUSE_INSTEAD)


def _pickles(_: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    if not adapter.inputs or adapter.format != "peft":
        return
    name = adapter.inputs[0].path.name
    if name.endswith(".bin"):
        remedy = Remedy("rewrite", "peft")
        yield from unusable(target, target.pickles, "pickled weights", [name], remedy)


RULES = (
    Rule(
        "LT501", "target-retired", "error",
        "The program no longer loads adapters.",
        "No change to the adapter helps.",
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
        each_target(_format),
    ),
    Rule(
        "LT503", "target-kind", "error",
        "The program does not apply adapters of this kind.",
        "Most programs check the kind; some apply the factors and ignore the rest.",
        "Make it a plain LoRA: `loratools to-lora ADAPTER --base MODEL --rank R -o PLAIN`.",
        "targets.toml",
        each_target(_kind),
    ),
    Rule(
        "LT504", "target-rank", "error",
        "A rank is larger or smaller than the program accepts.",
        "It refuses the adapter.",
        "Reduce it with the least error: `loratools squeeze ADAPTER -o NEW --rank R`.",
        "targets.toml",
        each_target(_rank),
    ),
    Rule(
        "LT505", "target-flag", "note",
        "The program accepts this rank only with a flag.",
        "Otherwise it refuses the adapter.",
        "Start it with the flag, or squeeze the adapter.",
        "targets.toml",
        each_target(_rank_flag),
    ),
    Rule(
        "LT506", "scale-dropped", "error",
        "The program uses another scale for a module than PEFT.",
        "It reads alpha and rank from the configuration, and ignores alpha_pattern, "
        "rank_pattern or use_rslora: the module loads, and its change is too strong or too "
        "weak. diffusers gives "
        "attention in files with kohya's names the alpha that most modules have.",
        "Give all modules one rank and scale without loss: "
        "`loratools squeeze ADAPTER -o NEW --uniform --rank R`; for diffusers "
        "`loratools convert ADAPTER NEW --to diffusers`.",
        "`PEFTHelper.from_dict` in vLLM 0.26; `LoRAAdapter` in SGLang; `get_scaling_factor` in "
        "LoRAX; `get_peft_kwargs` in diffusers",
        each_target(_scale), key="alpha_pattern",
    ),
    Rule(
        "LT507", "mixed-ranks", "error",
        "The program cannot load modules of different ranks.",
        "It fails, or reads the factors with the wrong rank.",
        "Pad them: `loratools squeeze ADAPTER -o NEW --uniform --rank R`.",
        "targets.toml",
        each_target(_mixed_ranks),
    ),
    Rule(
        "LT508", "rslora-dropped", "error",
        "The program ignores use_rslora.",
        "The change of every module is too weak by a factor of √r.",
        "Write plain scales: `loratools squeeze ADAPTER -o NEW --uniform --rank R`.",
        "targets.toml",
        each_target(_rslora),
    ),
    Rule(
        "LT509", "target-replacements", "error",
        "The program does not load whole tensors or token rows.",
        "It refuses them, or uses those of the base.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        each_target(_replacements),
    ),
    Rule(
        "LT510", "target-biases", "error",
        "The program does not load trained biases.",
        "It refuses them, or uses those of the base.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        each_target(_biases),
    ),
    Rule(
        "LT511", "target-layers", "error",
        "The program does not load factors of this kind of layer.",
        "It refuses them, or leaves them out.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        each_target(_layers),
    ),
    Rule(
        "LT512", "target-modules", "error",
        "The program adapts only modules of certain names.",
        "It refuses other modules.",
        "Fuse the adapter into its base: `loratools fuse BASE ADAPTER -o FUSED`.",
        "targets.toml",
        each_target(_module_names),
    ),
    Rule(
        "LT513", "target-pickles", "error",
        "The program does not load pickled weights.",
        "It refuses the adapter.",
        "Store them as safetensors: `loratools convert ADAPTER -o NEW --to peft`.",
        "targets.toml",
        each_target(_pickles),
    ),
)  # fmt: skip
