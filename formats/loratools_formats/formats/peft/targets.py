"""Which modules a PEFT configuration claims to adapt, and one configuration for several adapters.

PEFT creates modules from `target_modules` before it loads tensors, so a configuration that misses
an adapted module loses its tensors on loading.
Source: `check_target_module_exists` in peft/tuners/tuners_utils.py, 0.21.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.peft_facts import replaced_name
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.peft.config import MIDDLE_INITS, VARIANT_KEYS, is_set
from loratools_formats.formats.peft.keys import setting_name
from loratools_formats.formats.peft.patterns import matching

_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def merged_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    """Return the first configuration, widened to cover what all the adapters hold.

    Args:
        adapters: the first was read from a PEFT folder; of those that were not, the modules count.

    Raises:
        AdapterError: settings that cannot both hold, such as different token rows.
    """
    values = dict(adapters[0].config)
    if len(adapters) == 1:
        return values
    configs = [adapter.config for adapter in adapters if adapter.format == "peft"]
    others = [adapter for adapter in adapters if adapter.format != "peft"]
    choosing = ("target_modules", *_NARROWING)
    differ = any(config.get(key) != values.get(key) for config in configs for key in choosing)
    if others or differ:
        values["target_modules"] = _module_paths(adapters)
        values |= dict.fromkeys((key for key in _NARROWING if key in values), None)
    stacked = {p for other in others for c in other.modules.values() for p in c.layer.parameters}
    for key, more in (("modules_to_save", set()), ("target_parameters", stacked)):
        union = sorted({entry for config in configs for entry in config.get(key) or ()} | more)
        if union:
            values[key] = union
    for key in ("bias", "trainable_token_indices"):
        found = [config.get(key) for config in configs if config.get(key) not in (None, "none")]
        if any(value != found[0] for value in found[1:]):
            raise AdapterError(
                f"the adapters have different {key}", got=found[1], expected=found[0]
            )
        if found:
            values[key] = found[0]
    values["fan_in_fan_out"] = any(config.get("fan_in_fan_out") for config in configs)
    return values


def narrowed_config(adapter: Adapter) -> Mapping[str, Any]:
    """Return an adapter's configuration without what names only modules that it lost.

    PEFT would make layers for those all the same, and save them with the next training.

    Args:
        adapter: read from a PEFT folder, without the modules that were taken out.
    """
    values = dict(adapter.config)
    paths = _module_paths([adapter])
    parameters = {p for delta in adapter.modules.values() for p in delta.layer.parameters}
    if values.get("target_modules") is not None:
        values["target_modules"] = paths
        values |= dict.fromkeys((key for key in _NARROWING if key in values), None)
    if values.get("target_parameters"):
        named = [each for each in values["target_parameters"] if _ends(each, parameters)]
        values["target_parameters"] = named or None
    saved = {path for r in adapter.replacements.values() for path in paths_to(r.target)}
    if values.get("modules_to_save"):
        named = [e for e in values["modules_to_save"] if any(path.endswith(e) for path in saved)]
        values["modules_to_save"] = named or None
    if not any(r.kind == "token_rows" for r in adapter.replacements.values()):
        values |= dict.fromkeys({"trainable_token_indices"} & set(values), None)
    for key in ("rank_pattern", "alpha_pattern"):
        if values.get(key):
            names = [*map(setting_name, paths), *sorted(parameters)]
            kept = matching(values[key], names)
            values[key] = {each: value for each, value in values[key].items() if each in kept}
    return values


def _ends(name: str, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def paths_to(target: str) -> list[str]:
    """Return the modules that a tensor is in, the outermost first."""
    parts = target.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


_KEPT = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "modules_to_save", "peft_version", "revision", "task_type",
    "trainable_token_indices",
)  # fmt: skip


def with_factors(adapter: Adapter, modules: Mapping[str, ModuleChange]) -> Adapter:
    """Return a LoRA of plain factors or DoRAs; ranks and scales are left to the writer.

    A LoRA's configuration stays. Of another kind's, what every kind has is kept. An adapter of a
    format that is only read gets its biases under PEFT's names.
    """
    if adapter.format != "peft":
        replacements = {
            replaced_name(r.target, adapter.modules): r for r in adapter.replacements.values()
        }
        adapter = replace(
            adapter,
            format="peft",
            replacements=replacements,
            config={"bias": "lora_only" if replacements else "none", "inference_mode": True},
        )
    return replace(adapter, modules=dict(modules), shared={}, config=_factors_config(adapter))


def _factors_config(adapter: Adapter) -> Mapping[str, Any]:
    values = adapter.config
    if values.get("peft_type") == "LORA":
        cleared: dict[str, Any] = {key: None for key in VARIANT_KEYS if is_set(values.get(key))}
        if values.get("init_lora_weights") in MIDDLE_INITS:
            cleared["init_lora_weights"] = True
        return {**values, **cleared}
    kept = {key: values[key] for key in _KEPT if key in values}
    bias = kept.get("bias") or "none"
    # "boft_only", "vera_only" ...: biases of adapted layers, by the name that each kind gives it.
    bias = "lora_only" if isinstance(bias, str) and bias.endswith("_only") else bias
    return {
        "peft_type": "LORA",
        **kept,
        "bias": bias,
        "r": 1,
        "lora_alpha": 1,
        "target_modules": sorted(adapter.modules),
    }


def _module_paths(adapters: Sequence[Adapter]) -> list[str]:
    return sorted(
        {
            path
            for adapter in adapters
            for path, delta in adapter.modules.items()
            if not delta.layer.parameters
        }
    )
