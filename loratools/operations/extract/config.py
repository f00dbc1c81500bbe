"""The PEFT configuration of an extracted adapter; ranks and scales are the writer's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratools.base.placement import rules
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.peft_facts import targets


def peft_config(
    base: Checkpoint,
    modules: Mapping[str, ModuleChange],
    heads: Iterable[str],
    task: str | None,
    base_name: str | None,
) -> dict[str, Any]:
    """Return a PEFT configuration.

    Args:
        base: the checkpoint that the adapter is for.
        modules: the differences.
        heads: tensors that make a classifier of the base.
        task: of that classifier.
        base_name: what to record as the base model.
    """
    classes = base.config.get("architectures")
    causal = isinstance(classes, list) and any(
        isinstance(name, str) and name.endswith("ForCausalLM") for name in classes
    )
    layers = {name: delta.layer for name, delta in modules.items()}
    parameters = sorted({name for layer in layers.values() for name in layer.parameters})
    saved = sorted({_saved_module(key) for key in heads})
    return {
        "peft_type": "LORA",
        "task_type": task if saved else "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": any(
            layer.transposed_if_square for layer in layers.values() if not layer.parameters
        ),
        "inference_mode": True,
        "r": 1,
        "lora_alpha": 1,
        "target_modules": targets(
            (name for name, layer in layers.items() if not layer.parameters),
            (key.rpartition(".")[0] for key in base.tensors),
        ),
        **({"target_parameters": parameters} if parameters else {}),
        **({"modules_to_save": saved} if saved else {}),
    }


def _saved_module(key: str) -> str:
    """Return the module that PEFT saves whole for a tensor: all of a head, or a single module."""
    first = key.partition(".")[0]
    return first if first in rules.TASK_HEADS else key.rpartition(".")[0]
