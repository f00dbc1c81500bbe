"""Where a single file keeps its scales: `.alpha` tensors, or diffusers' metadata, never both.

Without either the scale is 1. The metadata is a PEFT configuration for each component of a
pipeline, its names packed as `transformer.lora_alpha`. Source: `loaders/lora_base.py` and
`loaders/peft.py` of diffusers 0.42, which raise on files that hold both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.factors import alpha_of
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_patterns import PatternsOf
from loratools_formats.core.single_file_keys import COMPONENTS
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk import strict_json
from loratools_formats.disk.errors import AdapterError
from loratools_formats.disk.strict_json import parsed_object
from loratools_formats.formats.peft.config import PeftConfig

METADATA_KEY = "lora_adapter_metadata"
_SWITCHES = ("use_dora", "lora_bias")


def stated_alpha(tensor: TensorRef, path: Path) -> float:
    """Return the number in an alpha tensor.

    Raises:
        AdapterError: it is not one finite number.
    """
    if tensor.numel != 1:
        raise AdapterError(
            "alpha is not one number", path=path, tensor=tensor.key, got=list(tensor.shape)
        )
    if not (tensor.dtype.floating or tensor.dtype.numpy_dtype().kind in "iu"):
        raise AdapterError(
            "alpha is no number", path=path, tensor=tensor.key, got=tensor.dtype.code
        )
    value = float(tensor.load().astype(np.float64).reshape(()))
    if not math.isfinite(value):
        raise AdapterError("alpha is not finite", path=path, tensor=tensor.key, got=value)
    return value


def states_scale(tensor: TensorRef, part: LowRank) -> bool:
    """Return whether an alpha tensor gives factors the scale that they have."""
    return float(tensor.load().astype(np.float64).reshape(())) / part.rank == part.scale


def alpha_tensor(key: str, part: LowRank) -> TensorRef:
    """Return the tensor that states a scale: in float32, unless that would round it."""
    alpha = np.float64(part.scale * part.rank)
    exact = float(np.float32(alpha)) / part.rank == part.scale
    return in_memory(key, np.array(alpha), "F32" if exact else "F64")


class Setting(NamedTuple):
    """What a file's metadata says of a module."""

    rank: int
    alpha: float
    scale: float


@dataclass(frozen=True)
class PackedConfigs:
    """The PEFT configurations in a file's metadata, by component."""

    configs: Mapping[str, PeftConfig]

    def settings(self, names: list[str]) -> dict[str, Setting]:
        """Return what the configurations say of each module that has one.

        Raises:
            AdapterError: a pattern is no regular expression, or takes too long.
        """
        result = {}
        for component, config in self.configs.items():
            prefix = f"{component}."
            paths = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            for path, (alpha, rank) in config.alpha_and_rank(sorted(paths)).items():
                result[prefix + path] = Setting(rank, float(alpha), config.scale(alpha, rank))
        return result

    def switches(self, names: Iterable[str]) -> dict[str, dict[str, bool]]:
        """Return what the configuration of each module's component says of DoRA and biases."""
        found = {}
        for component in sorted({name.partition(".")[0] for name in names}):
            config = self.configs.get(component)
            values = {} if config is None else config.values
            found[component] = {switch: bool(values.get(switch)) for switch in _SWITCHES}
        return found

    def caveats(self) -> tuple[Finding, ...]:
        """List why the factors do not tell the true ΔW, if they do not."""
        return tuple(caveat for config in self.configs.values() for caveat in config.caveats())


def packed_configs(metadata: Mapping[str, str], path: Path | None) -> PackedConfigs | None:
    """Return the configurations in a file's metadata, None if it has none.

    Raises:
        AdapterError: not sound JSON, or not a configuration per component.
    """
    if METADATA_KEY not in metadata:
        return None
    text = metadata[METADATA_KEY].encode()
    values = parsed_object(text, METADATA_KEY, path=path, max_depth=64)
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        component, dot, name = key.partition(".")
        if not dot or component not in COMPONENTS:
            raise AdapterError(
                f"{METADATA_KEY} has a setting of no known component",
                path=path,
                got=key,
                expected=f"one of {', '.join(COMPONENTS)} and a dot before the setting",
            )
        by_component.setdefault(component, {})[name] = value
    return PackedConfigs(
        {
            component: PeftConfig({"peft_type": "LORA", **config}, path)
            for component, config in by_component.items()
        }
    )


def switches(modules: Mapping[str, ModuleChange]) -> dict[str, dict[str, bool]]:
    """Return whether each component has DoRA and biases, as PEFT's configuration calls them.

    diffusers asks only the metadata, if there is any, and drops magnitudes and biases without it.
    """
    found: dict[str, dict[str, bool]] = {}
    for name, delta in modules.items():
        has = found.setdefault(name.partition(".")[0], dict.fromkeys(_SWITCHES, False))
        part = delta.factors
        has["use_dora"] |= part is not None and delta.is_dora
        has["lora_bias"] |= part is not None and part.bias is not None
    return found


def has_mixed_ranks(modules: Mapping[str, ModuleChange]) -> bool:
    """Return whether a component has modules of several ranks, and no alpha tensors.

    diffusers up to 0.39 takes the rank of the first module as alpha of all, and so multiplies the
    others by that rank over their own.
    """
    ranks: dict[str, set[int]] = {}
    for name, delta in modules.items():
        part = delta.factors
        if part is not None:
            if part.alpha_tensor is not None:
                return False
            ranks.setdefault(name.partition(".")[0], set()).add(part.rank)
    return any(len(found) > 1 for found in ranks.values())


def packed(modules: Mapping[str, ModuleChange], metadata: Mapping[str, str]) -> str:
    """Return diffusers' metadata that gives each module its rank, scale and kind.

    Args:
        modules: by name, component included.
        metadata: the file's metadata before, whose other settings are kept.

    Raises:
        AdapterError: the metadata before is not sound.
    """
    before = packed_configs(metadata, None)
    by_component: dict[str, dict[str, tuple[int, float]]] = {}
    for name, delta in modules.items():
        component, _, path = name.partition(".")
        part = delta.factors
        if part is not None:
            setting = (part.rank, part.scale)
            by_component.setdefault(component, {})[_in_any_version(path)] = setting
    switched = switches(modules)
    result: dict[str, Any] = {}
    for component, paths in sorted(by_component.items()):
        old = before.configs.get(component) if before is not None else None
        config = ({} if old is None else dict(old.values)) | _settings(paths)
        if config.get("use_rslora"):
            config["use_rslora"] = False
        config |= {k: on for k, on in switched[component].items() if on or k in config}
        config.setdefault("target_modules", sorted(paths))
        result |= {f"{component}.{key}": value for key, value in config.items()}
    return strict_json.dumps(result, indent=2, sort_keys=True, ensure_ascii=True)


def _in_any_version(path: str) -> str:
    """Return a path that matches a text encoder's module with and without its outer module.

    transformers 5 dropped `text_model` from CLIP's paths; patterns and targets match from the end.
    """
    return path.removeprefix("text_model.")


def _settings(paths: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    pattern_for = PatternsOf(list(paths)).pattern_for
    alphas = {name: alpha_of(rank, scale) for name, (rank, scale) in paths.items()}
    rank = max(r for r, _ in paths.values())
    alpha = next(alphas[name] for name, (r, _) in paths.items() if r == rank)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {pattern_for(n): r for n, (r, _) in paths.items() if r != rank},
        "alpha_pattern": {pattern_for(n): a for n, a in alphas.items() if a != alpha},
    }
