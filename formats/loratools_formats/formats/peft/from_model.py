"""Adapters of other formats as PEFT adapters: the configuration that their modules ask for.

Ranks and scales are left to the writer, which puts them into r, lora_alpha and the two patterns.
Modules are named in full, since without the base model nobody can tell whether a shorter name
would match modules that are not adapted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratools_formats.contract.format import Context
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.alora import INVOCATION_TOKENS, invocation_tokens
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.factors import stored_as
from loratools_formats.core.peft_facts import PREFIX, of_parameters
from loratools_formats.formats.peft import keys


def from_model(adapter: Adapter, context: Context) -> Adapter:
    """Return the adapter with a PEFT configuration, and without tensors PEFT has no place for."""
    modules = {path: stored_as(delta, context.dtype) for path, delta in adapter.modules.items()}
    if adapter.format == "peft":
        return replace(adapter, modules=modules)
    replacements = {_key(entry): entry for entry in adapter.replacements.values()}
    return replace(
        adapter,
        format="peft",
        modules=modules,
        replacements=replacements,
        carried={},
        config={
            **_config(modules, replacements, adapter.base_model),
            **_activation(adapter),
        },
    )


def _activation(adapter: Adapter) -> dict[str, Any]:
    tokens = invocation_tokens(adapter)
    return {} if tokens is None else {INVOCATION_TOKENS: tokens, "task_type": "CAUSAL_LM"}


def _key(entry: Replacement) -> str:
    if entry.kind == "token_rows":
        return keys.compose(entry.target.removesuffix(".weight"), "token_rows")
    return f"{PREFIX}{entry.target}"


def _config(
    modules: Mapping[str, ModuleChange],
    replacements: Mapping[str, Replacement],
    base_model: str | None,
) -> dict[str, Any]:
    parts = {path: delta.require_factors() for path, delta in modules.items()}
    named = {path: part for path, part in parts.items() if not part.layer.parameters}
    saved = [r.target.rpartition(".")[0] for r in replacements.values() if r.kind == "module"]
    values: dict[str, Any] = {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "all" if any(r.kind == "bias" for r in replacements.values()) else "none",
        "fan_in_fan_out": any(p.layer.transposed_if_square is True for p in named.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(set(saved)) or None,
        "peft_type": "LORA",
        "r": max((part.rank for part in parts.values()), default=1),
        "rank_pattern": {},
        "target_modules": sorted(named) or None,  # None: those that PEFT has for the model
        "task_type": None,
        "use_dora": any(delta.is_dora for delta in modules.values()),
        "use_rslora": False,
    }
    parameters = of_parameters(part.layer for part in parts.values())
    if parameters:
        values |= {"target_modules": sorted(named), **parameters}
    rows = [r for r in replacements.values() if r.kind == "token_rows"]
    if rows:
        values["trainable_token_indices"] = {
            r.target.removesuffix(".weight"): list(r.rows) for r in rows
        }
    return values
