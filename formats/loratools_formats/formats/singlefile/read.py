"""Reading a single-file adapter: every key by the grammar, every module by what it has.

The file's tensors are the truth. A module's name is its component and path as the file spells them
(a flattened path stays flattened: undoing that needs a list of names); each tensor keeps its own
key, so that a file whose modules are not renamed is written with the keys that it had.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools_formats.containers.safetensors_read import read_safetensors
from loratools_formats.core.adapter import Adapter, Addition, Replacement
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.factors import check_factor
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import PREFIX
from loratools_formats.core.single_file_keys import IA3_MARK, Key, Naming, Role, parse
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import (
    AdapterError,
    UnsupportedError,
    and_more,
    naming,
)
from loratools_formats.formats.singlefile.deltas import Parts, delta_of
from loratools_formats.formats.singlefile.dialects import dialects
from loratools_formats.formats.singlefile.left_in_names import as_loaders_know
from loratools_formats.formats.singlefile.scale import (
    METADATA_KEY,
    PackedConfigs,
    Setting,
    packed_configs,
)

CONTROL_MARK = "lora_controlnet"

OF_DIFFUSION = re.compile(
    r"(?:(?:double|single)(?:_stream)?_blocks|(?:double|single)_layers|vace_blocks"
    r"|(?:single_|joint_)?transformer_blocks|(?:down|up|input|output|joint)_blocks"
    r"|mid_block|middle_block|(?:noise|context)_refiner"
    r"|blocks\.\d+\.(?:self_attn|cross_attn)\.[qkvo]|blocks\.\d+\.attn[12]\.to_(?:[qkv]|out)"
    r"|layers\.\d+\.attention\.(?:qkv|to_[qkv]))(?:\.|$)"
)
"""Start of the paths of modules in UNets and diffusion transformers."""

_ADDED: dict[Role, str] = {
    "diff_b": "bias", "diff_m": "modulation", "b_norm": "bias", "w_norm": "weight",
}  # fmt: skip
"""Leaves that are added, and what they are added to; `diff_m` is LightX2V's."""
_REPLACED: dict[Role, str] = {"set_weight": "weight", "norm_scale": "scale"}
_CARRIED: frozenset[Role] = frozenset({"learned_embedding", "reshape_weight"})


def read(path: Path, *, carry_unknown: bool = False) -> Adapter:
    """Read a single-file adapter of any dialect, or of several.

    Args:
        path: a safetensors file.
        carry_unknown: keep tensors whose keys no rule claims, instead of refusing them.

    Raises:
        AdapterError: malformed, a key that no rule claims, or parts that do not fit together.
        UnsupportedError: an adapter kind that is known and not supported.
    """
    with naming(path):
        return _read(path, carry_unknown)


@dataclass
class _Outside:
    """What a file holds beside weight changes."""

    additions: dict[str, Addition] = field(default_factory=dict)
    replacements: dict[str, Replacement] = field(default_factory=dict)
    carried: dict[str, TensorRef] = field(default_factory=dict)

    def take(self, module: str, parts: Parts, path: Path) -> None:
        """Move what is no part of a module's weight change out of its parts."""
        for role in parts.keys() & _CARRIED:
            tensor = parts.pop(role)
            self.carried[tensor.key] = tensor
        for role in parts.keys() & _ADDED.keys():
            tensor = parts.pop(role)
            check_factor(tensor, path)
            self.additions[tensor.key] = Addition(f"{module}.{_ADDED[role]}", tensor)
        if "diff" in parts and len(parts["diff"].shape) == 1:  # of a norm
            tensor = parts.pop("diff")
            check_factor(tensor, path)
            self.additions[tensor.key] = Addition(f"{module}.weight", tensor)
        for role in parts.keys() & _REPLACED.keys():
            tensor = parts.pop(role)
            # ComfyUI names tensors that are no `weight` in full.
            is_whole = role == "set_weight" and module.endswith(".scale")
            target = module if is_whole else f"{module}.{_REPLACED[role]}"
            self.replacements[tensor.key] = Replacement("other", target, tensor)


def _read(path: Path, carry_unknown: bool) -> Adapter:
    file = read_safetensors(path)
    tensors, about_names = as_loaders_know(file.tensors)
    keys, unknown, outside = _sorted(tensors)
    if unknown and not carry_unknown:
        raise _unclaimed(unknown, keys, path)
    groups = _groups(keys, tensors, path)
    configs = packed_configs(file.metadata, path)
    _check_one_carrier(configs, keys, path)
    stated = {} if configs is None else configs.settings(sorted(groups))
    modules: dict[str, ModuleChange] = {}
    about_idle = _without_idle(groups, outside)
    for module in sorted(groups):
        outside.take(module, groups[module], path)
        if groups[module]:
            setting = stated.get(module)
            modules[module] = delta_of(module, groups[module], setting, path)
            _check_rank(modules[module], setting, path)
    _check_biases(outside.additions, modules)
    return Adapter(
        format=naming_class(keys.values()),
        source=path,
        modules=modules,
        additions=dict(sorted(outside.additions.items())),
        replacements=dict(sorted(outside.replacements.items())),
        carried=outside.carried,
        metadata=file.metadata,
        base_model=file.metadata.get("ss_base_model_version") or None,
        findings=(
            *(() if configs is None else configs.caveats()),
            *_about_scale(configs, keys),
            *_about_unknown(unknown),
            *about_names,
            *about_idle,
        ),
        dialects=dialects(keys),
        inputs=(file.file,),
    )


def _sorted(tensors: Mapping[str, TensorRef]) -> tuple[dict[str, Key], list[str], _Outside]:
    """Return the keys that the grammar claims, the others, and tensors outside of modules."""
    control = CONTROL_MARK in tensors
    keys: dict[str, Key] = {}
    unknown: list[str] = []
    outside = _Outside()
    for name, tensor in tensors.items():
        key = parse(name, control=control) or _of_ia3(name, tensors)
        if key is not None:
            keys[name] = key
        elif control and name != CONTROL_MARK and tensor.dtype.floating:
            outside.replacements[name] = Replacement("other", name, tensor)
        else:
            outside.carried[name] = tensor
            if name != CONTROL_MARK:
                unknown.append(name)
    return keys, unknown, outside


def _without_idle(groups: dict[str, Parts], outside: _Outside) -> list[Finding]:
    """Move what changes nothing out of the modules: an alpha alone, and factors of rank 0."""
    idle = [module for module, parts in groups.items() if _is_idle(parts)]
    for module in idle:
        for tensor in groups.pop(module).values():
            outside.carried[tensor.key] = tensor
    if not idle:
        return []
    text = f"an alpha alone, or factors of rank 0, which change nothing, in {and_more(idle)}"
    return [Finding("idle-modules", "warning", idle[0], text)]


def _is_idle(parts: Parts) -> bool:
    if parts.keys() == {"alpha"}:
        return True
    if not {"a", "b"} <= parts.keys() <= {"a", "b", "alpha"}:
        return False
    a, b = parts["a"].shape, parts["b"].shape
    rest = (*a[1:], *b[:1], *b[2:])
    return len(a) > 1 and len(b) > 1 and a[0] == b[1] == 0 and 0 not in rest


def _about_scale(configs: PackedConfigs | None, keys: Mapping[str, Key]) -> list[Finding]:
    """Say that a scale was not in the file, where PEFT wrote it and had one elsewhere."""
    bare = next((name for name, key in keys.items() if PREFIX in key.prefix), None)
    if bare is None or configs is not None or any(key.role == "alpha" for key in keys.values()):
        return []
    text = (
        "PEFT's names, and no scale in the file: it is taken as 1, as diffusers and ComfyUI take "
        "it, whatever the training's configuration said"
    )
    return [Finding("scale-assumed", "warning", bare, text)]


def _about_unknown(names: list[str]) -> list[Finding]:
    text = f"carried without being understood: {', '.join(names)}"
    return [Finding("unknown-tensors", "warning", names[0], text)] if names else []


def _of_ia3(name: str, tensors: Mapping[str, TensorRef]) -> Key | None:
    """Return the parts of the key of LyCORIS' IA³, which only its neighbour tells apart."""
    module = name.removesuffix(".weight")
    mark = parse(module + IA3_MARK) if module + IA3_MARK in tensors else None
    return None if mark is None else replace(mark, role="ia3")


def naming_class(keys: Iterable[Key]) -> Naming:
    """Return the class of a file's naming, `safetensors` if it has several."""
    found = {key.naming for key in keys if key.role != "learned_embedding"}
    return found.pop() if len(found) == 1 else "safetensors"


def _unclaimed(unknown: list[str], keys: Mapping[str, Key], path: Path) -> AdapterError:
    if not keys:
        return AdapterError(
            "no key is one of a single-file adapter",
            path=path,
            tensor=unknown[0],
            hint="Is it a checkpoint rather than an adapter?",
        )
    several = len(unknown) > 1
    return AdapterError(
        f"{len(unknown)} unknown tensors in the adapter; they may change the weights"
        if several
        else "unknown tensor in the adapter; it may change the weights",
        path=path,
        tensor=unknown[0],
        expected=f"such as {next(iter(keys))}",
        hint="Pass `carry_unknown=True` to keep it as it is",
    )


def _groups(
    keys: Mapping[str, Key], tensors: Mapping[str, TensorRef], path: Path
) -> dict[str, Parts]:
    groups: dict[str, Parts] = {}
    for name, key in keys.items():
        if key.role == "refused":
            raise UnsupportedError(
                "raw training checkpoints of LyCORIS, and GLoRA with a Tucker core, are not "
                "supported: save the network's weights",
                path=path,
                tensor=name,
            )
        parts = groups.setdefault(key.module, {})
        if key.role in parts:
            raise AdapterError(
                "two tensors of one module have the same part",
                path=path,
                tensor=name,
                got=parts[key.role].key,
            )
        parts[key.role] = tensors[name]
    return groups


def _check_one_carrier(configs: PackedConfigs | None, keys: Mapping[str, Key], path: Path) -> None:
    alpha = next((name for name, key in keys.items() if key.role == "alpha"), None)
    if configs is not None and alpha is not None:
        raise AdapterError(
            f"the file states scales twice, in alpha tensors and in {METADATA_KEY}",
            path=path,
            tensor=alpha,
            expected="one of the two, since loaders disagree on such files",
        )


def _check_biases(additions: Mapping[str, Addition], modules: Mapping[str, ModuleChange]) -> None:
    """Raise `AdapterError` if what is added to a bias has not one number for each output."""
    for addition in additions.values():
        module, _, leaf = addition.target.rpartition(".")
        out = modules[module].shape[0] if leaf == "bias" and module in modules else None
        if out is not None and addition.tensor.numel != out:
            raise AdapterError(
                "difference of a bias does not fit its module",
                tensor=addition.tensor.key,
                got=list(addition.tensor.shape),
                expected=f"{out} numbers, one for each output",
            )


def _check_rank(delta: ModuleChange, setting: Setting | None, path: Path) -> None:
    part = delta.factors
    if setting is not None and part is not None and part.rank != setting.rank:
        raise AdapterError(
            f"rank in the file and rank in {METADATA_KEY} differ",
            path=path,
            tensor=part.a.key,
            got=part.rank,
            expected=setting.rank,
        )
