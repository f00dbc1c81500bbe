"""Rules about factors of experts: layouts that a loader ignores, or reads as something else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from loratools.operations.check.rule import Found, Rule
from loratools.operations.check.serving import each_target
from loratools.operations.check.subject import Subject
from loratools.operations.check.targets import Target
from loratools.operations.convert.experts.groups import types_of
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.expert_names import OF_MIXTRAL

_SINGLE = re.compile(r"(?:.*\.)?experts\.\d+\.(?P<leaf>\w+)|.*\.(?:gate_up|down)_projs\.\d+")
_NOT_CONVERTED = frozenset({"nemotron_h", "lfm2_moe", "gpt_oss", "llama4", "llama4_text"})
"""Models whose single experts PEFT on transformers 5 loads without converting any; we ran it."""


def _types(subject: Subject, adapter: Adapter) -> frozenset[str]:
    return subject.base.types if subject.base is not None else types_of(adapter, None)


def _lost(subject: Subject) -> Iterator[Found]:
    """Yield what PEFT's own stacking of single experts leaves out on transformers 5."""
    adapter = subject.adapter
    if adapter is None or adapter.format != "peft":
        return
    single = {name: match for name in adapter.modules if (match := _SINGLE.fullmatch(name))}
    if not single:
        return
    first = next(iter(single))
    leaves = {match["leaf"] or "" for match in single.values()}
    types = sorted(_types(subject, adapter) & _NOT_CONVERTED)
    if types:
        yield Found(f"PEFT changes no expert of {types[0]} by adapters of single experts", first)
        return
    if leaves & {"", "gate_up_proj"}:
        yield Found("PEFT loads joined gate_up of single experts in another layout", first)
        return
    projections = {OF_MIXTRAL.get(leaf, leaf) for leaf in leaves}
    if "up_proj" in projections and "gate_proj" not in projections:
        yield Found("PEFT stacks gate and up together, and stops where gate is missing", first)
    others = [
        name
        for name in adapter.modules
        if name not in single and name.rpartition(".")[2] in leaves | projections
    ]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        text = (
            f"PEFT drops {others[0]}{more}: it takes the names of the experts' projections out of "
            "target_modules when it stacks them"
        )
        yield Found(text, others[0])
    yield from _rescaled(subject, adapter, single)


def _rescaled(
    subject: Subject, adapter: Adapter, single: Mapping[str, re.Match[str]]
) -> Iterator[Found]:
    """Yield what PEFT scales otherwise as it stacks single experts.

    A stack has one rank and alpha. That of gate and up has twice the configuration's, which is
    right but for rsLoRA. Patterns count that name a stack as its class does: none of gate and up,
    and none of w1, w3 and w2.
    """
    by_stack: dict[tuple[str, str], set[tuple[int | None, float]]] = {}
    joined: list[str] = []
    unheard: set[str] = set()
    for name, match in single.items():
        change = adapter.modules[name]
        if change.factors is None:
            continue
        leaf = OF_MIXTRAL.get(match["leaf"] or "", match["leaf"] or "")
        if leaf in ("gate_proj", "up_proj"):
            joined.append(name)
        if leaf in ("gate_proj", "up_proj") or leaf != match["leaf"]:
            unheard.add(leaf)
        owner = name.rpartition(".experts.")[0]
        by_stack.setdefault((owner, leaf), set()).add((change.rank, change.factors.scale))
    has_gate = any(leaf == "gate_proj" for _, leaf in by_stack)
    if has_gate and subject.config.get("use_rslora"):
        text = "PEFT makes gate and up of rsLoRA √2 times as strong when it stacks them"
        yield Found(text, joined[0])
        return
    usual = _usual(subject.config) if has_gate else None
    for (owner, leaf), found in by_stack.items():
        if len(found) > 1 or (leaf in unheard and usual is not None and found != {usual}):
            text = (
                f"PEFT gives a stack of experts one rank and alpha, and {leaf} of {owner}.experts "
                "has others by rank_pattern or alpha_pattern"
            )
            yield Found(text, f"{owner}.experts")
            return


def _usual(config: Mapping[str, Any]) -> tuple[int, float] | None:
    """Return the rank and scale that a configuration gives modules of no pattern."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        return None
    return rank, alpha / rank


def _layout(subject: Subject, adapter: Adapter, target: Target) -> Iterator[Found]:
    layout = adapter.expert_layout
    if adapter.format != "peft" or layout is None or not target.expert_layouts:
        return
    types = _types(subject, adapter)
    readable = target.expert_layouts
    if target.stacked_experts:
        if not types:
            return
        readable = ("stacked",) if types & set(target.stacked_experts) else readable
    swapped = [name for name, change in adapter.modules.items() if change.layer.swapped]
    if layout.name not in readable:
        text = f"{target.label} does not read experts stored so: {layout.described}"
    elif swapped and not types & {"llama4", "llama4_text"}:
        text = (
            f"{target.label} needs A of stacked experts on the inputs, and {swapped[0]} has it on "
            "the outputs"
        )
    else:
        return
    hint = f"loratools convert ADAPTER --base MODEL --for {target.name} -o NEW"
    yield Found(text, target=target.name, hint=hint)


RULES = (
    Rule(
        "LT114", "expert-order-doubtful", "warning",
        "A marker states an order of stacked experts that does not fit the values.",
        "If it is read in the wrong order, every expert gets parts of other experts' changes.",
        "Find out which program trained it. If the marker is wrong, write the adapter again: "
        "`loratools convert ADAPTER -o NEW --set lora_B_layout=ORDER`.",
        "columns of lora_B of trained adapters, measured",
        of_readers=("expert-order-doubtful",),
    ),
    Rule(
        "LT115", "projections-in-parts", "warning",
        "Modules are parts of a projection that is one module in the model, as Tinker adapts them.",
        "PEFT and programs that read its folders find no such module, and do not change it.",
        "Join the parts: `loratools convert ADAPTER --to peft --base MODEL -o NEW`.",
        "`tinker_cookbook/weights/_adapter.py` at 9dfcc3a2",
        of_readers=("projections-in-parts",),
    ),
    Rule(
        "LT411", "experts-lost", "warning",
        "When PEFT on transformers 5 stacks single experts, it drops parts of the adapter or "
        "changes their scale.",
        "The adapter loads without a warning, or with one that names other keys, and makes "
        "another change than it was trained for.",
        "Write the names of transformers 5: "
        "`loratools convert ADAPTER --base MODEL --experts stacked -o NEW`.",
        "`transformers_weight_conversion.py` of peft 0.21.2, run with transformers 5.23",
        _lost,
    ),
    Rule(
        "LT517", "target-experts", "error",
        "The program does not read factors of experts in this layout, for this model.",
        "It stops, or does not change the experts.",
        "Write the layout that it reads: "
        "`loratools convert ADAPTER --base MODEL --for PROGRAM -o NEW`.",
        "targets.toml",
        each_target(_layout),
    ),
)  # fmt: skip
