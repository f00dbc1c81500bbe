"""Tensors of a PEFT file that are no factors: replacements of base tensors, or carried along.

PEFT copies any such tensor over the base tensor of the same name when it loads an adapter, so all
that have that form are replacements, whatever the configuration says. What stands beside a
module's factors and is not known could change ΔW, and is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools_formats.checkpoints.facts import is_vocabulary
from loratools_formats.core.adapter import Replacement
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import PREFIX
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, and_more, printable
from loratools_formats.formats.peft import keys
from loratools_formats.formats.peft.targets import paths_to

_LORA_WORD = re.compile(r"(?<![a-z])lora(?![a-z])", re.IGNORECASE)


def classify(
    values: Mapping[str, Any],
    rest: dict[str, TensorRef],
    modules: Mapping[str, ModuleChange],
    folder: Path,
) -> tuple[dict[str, Replacement], dict[str, TensorRef]]:
    """Return the replacements and the carried tensors among the rest of a file.

    Replacements of rows come last, since they go over a whole embedding of the same file.

    Raises:
        AdapterError: a tensor stands beside factors and is not known, or token rows do not fit.
    """
    replacements: dict[str, Replacement] = {}
    of_rows: dict[str, Replacement] = {}
    carried: dict[str, TensorRef] = {}
    for name, tensor in rest.items():
        key = keys.parse(name)
        if key is not None and key.part == "token_rows":
            rows = _token_rows(values, key.path, tensor, folder)
            of_rows[name] = Replacement("token_rows", f"{key.path}.weight", tensor, rows)
            continue
        if _belongs_to_training(values, name) or any(n in rest for n in keys.saved_again(name)):
            carried[name] = tensor
            continue
        target = keys.base_tensor(name)
        kind = None if target is None else _replacement_kind(values, name, target)
        _refuse_if_beside_factors(name, kind, modules, folder)
        if kind is None or target is None:
            carried[name] = tensor
        else:
            replacements[name] = Replacement(kind, target, tensor)
    return replacements | of_rows, carried


def about_unknown(
    values: Mapping[str, Any],
    replacements: Mapping[str, Replacement],
    carried: Mapping[str, TensorRef],
) -> list[Finding]:
    """Tell of tensors that nobody knows: whether they have an effect shows beside the base only."""
    unknown = [name for name, entry in replacements.items() if entry.kind == "parameter"]
    unknown += [
        name
        for name in carried
        if not _belongs_to_training(values, name) and not keys.saved_again(name)
    ]
    if not unknown:
        return []
    shown = [printable(name) for name in unknown]
    text = (
        f"{and_more(shown)}: not known; PEFT and `fuse` put such a tensor over the "
        "base's of the same name, if there is one"
    )
    return [Finding("unknown-tensors", "warning", shown[0], text)]


def _belongs_to_training(values: Mapping[str, Any], name: str) -> bool:
    if name.endswith(keys.SPREAD):
        return True
    declared = any(values.get(key) for key in ("velora_config", "monteclora_config"))
    return declared and any(f"{suffix}." in f"{name}." for suffix in keys.TRAINING_SUFFIXES)


def _refuse_if_beside_factors(
    name: str, kind: str | None, modules: Mapping[str, ModuleChange], folder: Path
) -> None:
    leaf = name.rpartition(".")[2]
    path = name.removeprefix(PREFIX)
    owners = [part for part in paths_to(path) if part in modules]
    wrapped = {f"{owner}.{leaf}" for owner in owners} | {
        f"{owner}.base_layer.{leaf}" for owner in owners
    }
    if leaf in ("weight", "bias") and path in wrapped:
        return
    # The base's own modules may be called lora-something.
    if not owners and (kind in ("module", "bias") or not _LORA_WORD.search(name)):
        return
    raise AdapterError(
        "unknown tensor beside adapter factors; it may change the weights",
        path=folder,
        tensor=name,
        hint="This is a variant of LoRA that is not supported, or a foreign tensor",
    )


def _token_rows(
    values: Mapping[str, Any], path: str, tensor: TensorRef, folder: Path
) -> tuple[int, ...]:
    indices = values.get("trainable_token_indices")
    if isinstance(indices, dict):
        matching = [rows for name, rows in indices.items() if path.endswith(name)]
        # A tied output layer is trained through the embedding's entry.
        choices = matching or (list(indices.values()) if len(indices) == 1 else [])
        rows = choices[0] if len(choices) == 1 else None
    else:
        rows = indices
    if rows is None or len(tensor.shape) != 2 or len(rows) != tensor.shape[0]:
        raise AdapterError(
            "token rows do not fit config trainable_token_indices",
            path=folder,
            tensor=tensor.key,
            got=list(tensor.shape),
            expected="one row per index",
        )
    return tuple(rows)


def _replacement_kind(values: Mapping[str, Any], name: str, target: str) -> Any:
    path, _, leaf = target.rpartition(".")
    saved = values.get("modules_to_save") or ()
    if any(prefix.endswith(entry) for entry in saved for prefix in [*paths_to(target), path]):
        return "module"
    if leaf == "bias" and values.get("bias", "none") != "none":
        return "bias"
    if leaf == "weight" and (name.endswith(".base_layer.weight") or is_vocabulary(path)):
        return "embedding"
    return "other" if leaf in ("weight", "bias") else "parameter"
