"""Which modules a PEFT configuration claims to adapt, and one configuration for several adapters.

PEFT creates modules from `target_modules` before it loads tensors, so a configuration that misses
an adapted module loses its tensors on loading.
Source: `check_target_module_exists` in peft/tuners/tuners_utils.py, 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loratools_formats.adapter import Adapter, low_rank_part
from loratools_formats.errors import AdapterError

_NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def merged_config(adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    """Return the first configuration, widened to cover what all the adapters hold.

    Args:
        adapters: read from PEFT folders.

    Raises:
        AdapterError: settings that cannot both hold, such as different token rows.
    """
    values = dict(adapters[0].config)
    if len(adapters) == 1:
        return values
    configs = [adapter.config for adapter in adapters]
    choosing = ("target_modules", *_NARROWING)
    if any(config.get(key) != values.get(key) for config in configs for key in choosing):
        values["target_modules"] = _module_paths(adapters)
        values |= dict.fromkeys((key for key in _NARROWING if key in values), None)
    for key in ("modules_to_save", "target_parameters"):
        union = sorted({entry for config in configs for entry in config.get(key) or ()})
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


def _module_paths(adapters: Sequence[Adapter]) -> list[str]:
    return sorted(
        {
            path
            for adapter in adapters
            for path, delta in adapter.modules.items()
            if not low_rank_part(delta).layer.parameters
        }
    )
