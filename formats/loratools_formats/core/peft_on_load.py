"""What PEFT on transformers 5 makes of single experts when it loads them.

It stacks them, for its models hold stacks, and loses what this tells of. `check` makes findings of
it about adapters that are there, and the format about those that it writes.

Source: `transformers_weight_conversion.py` of peft 0.21.2, run with transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.expert_names import LISTED, OF_MIXTRAL, SINGLE
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import stacked_on_loading
from loratools_formats.disk.errors import and_more

_NOT_CONVERTED = frozenset(
    {
        "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "deepseek_ocr2",
        "deepseek_ocr2_text", "deepseek_v4", "dots3_note", "dots3_note_text", "flint",
        "glm5_next", "glm5_next_text", "gpt_oss", "granitemoe", "granitemoe_swa",
        "granitemoehybrid", "granitemoeshared", "hy_v3", "hy_v4", "inkling2",
        "inkling2_text", "inkling_mm_model", "inkling_text", "jamba", "kimi_k25",
        "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "llama4_text",
        "mimo_v2_flash", "minimax_m3_vl", "minimax_m3_vl_text", "mistral4",
        "mistral_large4", "mistral_large4_text", "nemo_speechlm", "nemotron_h",
        "nemotron_h_omni", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe",
        "qwen3_5_moe_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen4_exp",
        "qwen4_exp_text", "step3p5", "step3p7", "unlimited_ocr", "unlimited_ocr_text",
        "zaya",
    }
)  # fmt: skip
"""Models that hold stacks, and for which PEFT has no way from single experts to them."""


def parameters_of(adapter: Adapter) -> list[str]:
    """Return the modules of an adapter that PEFT adapts as parameters, single experts included."""
    found = [name for name, change in adapter.modules.items() if change.layer.parameters]
    return found or stacked_on_loading(adapter.modules)


def about_load(
    adapter: Adapter, types: Collection[str], config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield findings about what is lost of an adapter to be written; see `lost_on_load`."""
    for text, where in lost_on_load(adapter, types, config):
        hint = "`experts=stacked` with `base` writes the names that it reads"
        yield Finding("experts-lost", "note", where, f"on transformers 5, {text}", hint)


def lost_on_load(
    adapter: Adapter, types: Collection[str], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield what PEFT leaves out or changes, as a sentence, and a module that shows it.

    Args:
        adapter: under PEFT's names.
        types: the model types of its base, as far as they are known.
        config: its configuration.
    """
    single = _single_experts(adapter)
    if not single:
        return
    first, leaves = next(iter(single)), set(single.values())
    unread = not_converted(types)
    if unread is not None:
        yield (
            f"PEFT finds no expert of {unread} by the names of single experts, and changes none",
            first,
        )
        return
    if leaves & {"", "gate_up_proj"}:
        yield "PEFT loads joined gate_up of single experts in another layout", first
        return
    projections = {OF_MIXTRAL.get(leaf, leaf) for leaf in leaves}
    if "up_proj" in projections and "gate_proj" not in projections:
        yield "PEFT stacks gate and up together, and stops where gate is missing", first
    yield from _without_down(single)
    others = [
        name
        for name in adapter.modules
        if name not in single and name.rpartition(".")[2] in leaves | projections
    ]
    if others:
        text = (
            f"PEFT drops {and_more(others)}: it takes the names of the experts' projections out of "
            "target_modules when it stacks them"
        )
        yield text, others[0]
    yield from _rescaled(adapter, single, config)


def not_converted(types: Collection[str]) -> str | None:
    """Return a model type among some whose single experts PEFT loads without converting any."""
    return next(iter(sorted(_NOT_CONVERTED.intersection(types))), None)


def _single_experts(adapter: Adapter) -> dict[str, str]:
    """Return projections of single experts, and what each is called; empty if it is of a list."""
    found = {}
    for name in adapter.modules:
        if match := SINGLE.fullmatch(name):
            found[name] = match["leaf"]
        elif LISTED.fullmatch(name):
            found[name] = ""
    return found


def _without_down(single: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield a layer whose gate and up PEFT nests in a stack of down that it has not."""
    found: dict[str, dict[str, str]] = {}
    for name, leaf in single.items():
        of_layer = found.setdefault(name.rpartition(".experts.")[0], {})
        of_layer.setdefault(OF_MIXTRAL.get(leaf, leaf), name)
    for of_layer in found.values():
        if "gate_proj" in of_layer and "down_proj" not in of_layer:
            text = "PEFT loads gate and up within a stack of down, and leaves them out without one"
            yield text, of_layer["gate_proj"]
            return


def _rescaled(
    adapter: Adapter, single: Mapping[str, str], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield what PEFT scales otherwise as it stacks single experts.

    A stack has one rank and alpha. That of gate and up has twice the configuration's, which is
    right but for rsLoRA. Patterns count that name a stack as its class does: none of gate and up,
    and none of w1, w3 and w2.
    """
    by_stack: dict[tuple[str, str], set[tuple[int | None, float]]] = {}
    joined: list[str] = []
    unheard: set[str] = set()
    for name, called in single.items():
        change = adapter.modules[name]
        if change.factors is None:
            continue
        leaf = OF_MIXTRAL.get(called, called)
        if leaf in ("gate_proj", "up_proj"):
            joined.append(name)
        if leaf in ("gate_proj", "up_proj") or leaf != called:
            unheard.add(leaf)
        owner = name.rpartition(".experts.")[0]
        by_stack.setdefault((owner, leaf), set()).add((change.rank, change.factors.scale))
    has_gate = any(leaf == "gate_proj" for _, leaf in by_stack)
    if has_gate and config.get("use_rslora"):
        text = "PEFT makes gate and up of rsLoRA √2 times as strong when it stacks them"
        yield text, joined[0]
        return
    usual = _usual(config) if has_gate else None
    for (owner, leaf), found in by_stack.items():
        if len(found) > 1 or (leaf in unheard and usual is not None and found != {usual}):
            text = (
                f"PEFT gives a stack of experts one rank and alpha, and {leaf} of {owner}.experts "
                "has others by rank_pattern or alpha_pattern"
            )
            yield text, f"{owner}.experts"
            return


def _usual(config: Mapping[str, Any]) -> tuple[int, float] | None:
    """Return the rank and scale that a configuration gives modules of no pattern."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        return None
    return rank, alpha / rank
