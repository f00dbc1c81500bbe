"""Reading a PEFT folder of another kind than LoRA, by the table in `kinds`.

As strict as for LoRA: a configuration key that is set and not known to be neutral is a caveat, and
every tensor is a part of a module, shared, a replacement, or an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools_formats.checkpoints.facts import is_embedding
from loratools_formats.core.change import KindDelta, Layer, ModuleChange
from loratools_formats.core.config_values import Values
from loratools_formats.core.findings import Finding
from loratools_formats.core.kind_shapes import check_shapes
from loratools_formats.core.peft_facts import PREFIX, square_orientation
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError
from loratools_formats.formats.peft.config import OF_TRAINERS, is_set, unknown_key
from loratools_formats.formats.peft.kinds.declaration import NOT_A_CHANGE, Module, PeftKind
from loratools_formats.formats.peft.kinds.table import PEFT_KINDS
from loratools_formats.formats.peft.patterns import match_patterns

_COMMON_KEYS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_weights", "layers_pattern", "layers_to_transform",
        "modules_to_save", "peft_type", "peft_version", "revision", "runtime_config",
        "target_modules", "task_type",
    }
)  # fmt: skip


_MOST = 1 << 31
_NUMBER = re.compile(r"\.(\d+)(?=(\.weight)?$)")
"""The number of a tensor that is one of several, at the end of its name."""


def reason_against(peft_type: str) -> Finding | None:
    """Return why a kind has no change of weights that could be told, None if it has one."""
    reason = NOT_A_CHANGE.get(peft_type)
    if reason is None:
        return None
    return Finding(
        "no-weight-change",
        "error",
        "peft_type",
        f"it is of PEFT's kind {peft_type}: {reason}",
        "There is no way to fold it",
    )


def left_to_loader(peft_type: Any, modules: Mapping[str, ModuleChange]) -> str:
    """Name what a file leaves to be computed from the base; empty if nothing."""
    kind = PEFT_KINDS.get(peft_type)
    return "" if kind is None else kind.left_to_loader(modules)


def caveats_of(values: Mapping[str, Any]) -> list[Finding]:
    """Return a finding for each key that is set and not known."""
    kind = PEFT_KINDS[values["peft_type"]]
    known = _COMMON_KEYS | OF_TRAINERS | kind.used | kind.neutral | kind.patterns
    return [
        unknown_key(key, value)
        for key, value in sorted(values.items())
        if key not in known and is_set(value)
    ]


def read_modules(
    values: Mapping[str, Any], tensors: Mapping[str, TensorRef], folder: Path
) -> tuple[dict[str, KindDelta], dict[str, TensorRef], dict[str, TensorRef]]:
    """Return the modules, the tensors that they share, and the rest of the file.

    Raises:
        AdapterError: a module lacks a tensor or a setting, or its tensors do not fit.
        UnsupportedError: a variant that is not known.
    """
    peft_type = values["peft_type"]
    kind = PEFT_KINDS[peft_type]
    stem = re.match(r"\.[a-z0-9]+_", next(iter(kind.parts)))
    own: dict[str, dict[str, TensorRef]] = {}
    shared: dict[str, TensorRef] = {}
    rest: dict[str, TensorRef] = {}
    for name, tensor in tensors.items():
        if _shared_part(kind, name) is not None:
            shared[name] = tensor
            continue
        found = _own_part(kind, name)
        if found is None:
            # What is no part of a module and lies outside the model, too, could change ΔW.
            if not name.startswith(PREFIX) or (stem is not None and stem[0] in name):
                raise AdapterError(
                    f"unknown tensor in an adapter of kind {peft_type}; it may change the weights",
                    path=folder,
                    tensor=name,
                )
            rest[name] = tensor
        else:
            own.setdefault(found[0], {})[found[1]] = tensor
    names = sorted(own)
    ranks = match_patterns(_numbers(values, kind, "rank_pattern"), names, folder)
    alphas = match_patterns(_numbers(values, kind, "alpha_pattern"), names, folder)
    modules = {}
    for path in names:
        alpha = alphas.get(path, values.get("alpha"))
        rank = ranks.get(path, values.get("r"))
        delta = _delta(kind, values, path, own[path], shared, alpha, rank)
        of_all = kind.settings_of_all(len(names))
        modules[path] = replace(delta, settings={**delta.settings, **of_all})
    return modules, shared, rest


# As PEFT takes them: an alpha of 0 does nothing, a negative one subtracts.
_LEAST = {"rank_pattern": 0, "alpha_pattern": -math.inf}


def _numbers(values: Mapping[str, Any], kind: PeftKind, key: str) -> dict[str, float]:
    """Return a pattern map, empty if it holds something else or has no influence."""
    found = values.get(key) if key in kind.patterns else None
    if found is None:
        return {}
    is_map = isinstance(found, dict) and all(
        type(number) in (int, float) and _LEAST[key] < number < math.inf
        for number in found.values()
    )
    if not is_map:
        raise AdapterError(
            f"config value {key} is wrong", got=found, expected="a map from names to numbers"
        )
    return dict(found)


def _shared_part(kind: PeftKind, name: str) -> str | None:
    for pattern, part in kind.shared.items():
        head, found, tail = pattern.partition("{}")
        if not found and name == pattern:
            return part
        if found and name.startswith(head) and name.endswith(tail) and len(name) > len(head):
            return part.replace("{}", name[len(head) :])
    return None


def _own_part(kind: PeftKind, name: str) -> tuple[str, str] | None:
    if not name.startswith(PREFIX):
        return None
    numbered = _NUMBER.sub(".{}", name)
    number = _NUMBER.search(name)
    for suffix, part in kind.parts.items():
        if "{}" in suffix:
            if number is not None and numbered.endswith(suffix):
                end = len(numbered) - len(suffix)
                return numbered[len(PREFIX) : end], part.replace("{}", number[1])
        elif name.endswith(suffix) and len(name) > len(PREFIX) + len(suffix):
            return name[len(PREFIX) : -len(suffix)], part
    return None


def _delta(
    kind: PeftKind,
    values: Mapping[str, Any],
    path: str,
    own: dict[str, TensorRef],
    shared: Mapping[str, TensorRef],
    alpha: Any,
    rank: Any,
) -> KindDelta:
    common = _shared_of(kind, path, shared)
    for number, name, least in ((alpha, "alpha", -_MOST), (rank, "r", 0)):
        wrong = number is not None and (
            type(number) not in (int, float) or not least < number < _MOST
        )
        if wrong and name in kind.used:
            expected = "a number" if least else "a number above 0"
            raise AdapterError(f"config value {name} is wrong", got=number, expected=expected)
    module = Module(path, {**common, **own}, alpha, rank)
    try:
        lengths = check_shapes(kind.variant(module) or kind.kind, module.parts)
        _check_sizes(kind, values, module, lengths)
        shape = kind.shape(module)
        settings = kind.settings(Values(values), module)
    except KeyError as error:
        raise AdapterError(
            "module lacks a tensor",
            tensor=path,
            got=", ".join(tensor.key for tensor in own.values()),
            expected=_expected(kind, str(error.args[0])),
        ) from error
    turn = square_orientation(bool(values.get("fan_in_fan_out")), path)
    layer = Layer("linear", transposed_if_square=turn)
    ends = [end for end, part in kind.parts.items() if part in own and own[part].key.endswith(end)]
    if kind.layer == "embedding" or any("_embedding_" in end for end in ends):
        layer = Layer("embedding")
    elif kind.takes_embeddings and is_embedding(path):
        layer, shape = Layer("embedding"), shape[::-1]
    kernels = [own[part].shape[2:] for part in kind.kernel_of if part in own]
    if any(kernels):
        layer = Layer("conv", kernel=next(filter(None, kernels)))
    return KindDelta(kind.variant(module) or kind.kind, own, settings, layer, shape, common)


def _check_sizes(
    kind: PeftKind, values: Mapping[str, Any], module: Module, lengths: Mapping[str, int]
) -> None:
    """Refuse a module whose tensors have other lengths than the configuration says.

    Raises:
        AdapterError: a length and the configuration differ.
    """
    if any(values.get(key) for key in kind.sizes_vary_by):
        return
    for name, key in kind.sizes.items():
        stated = module.rank if key == "r" else values.get(key)
        if name in lengths and stated is not None and stated != lengths[name]:
            raise AdapterError(
                f"the tensors and the config's {key} differ",
                tensor=module.path,
                got=f"{lengths[name]} in the tensors",
                expected=f"{key} = {stated}",
            )


def _expected(kind: PeftKind, part: str) -> str:
    names = {p: suffix for suffix, p in kind.parts.items()} | {
        p: name for name, p in kind.shared.items()
    }
    return names.get(part, part)


def _shared_of(kind: PeftKind, path: str, shared: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    end = None if kind.shared_by is None else kind.shared_by(path)
    return {
        part: tensor
        for name, tensor in shared.items()
        if end in (None, name.rpartition(".")[2]) and (part := _shared_part(kind, name)) is not None
    }
