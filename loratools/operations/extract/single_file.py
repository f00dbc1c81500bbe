"""The LoRA between two diffusion checkpoints under the names of single files.

Prefixes of an all-in-one checkpoint become components, OpenCLIP's text encoders get transformers'
names, and what changed in norms and biases is added. Everything else about names is `convert`'s.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from loratools.naming.bare_base import told_component
from loratools.naming.base_components import (
    DENOISER,
    BaseComponent,
    components_of,
    transformers_paths,
)
from loratools.naming.restructure import rows_of, units
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter, Addition, Replacement
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.single_file_keys import COMPONENTS
from loratools_formats.core.tensors import TensorRef, in_memory
from loratools_formats.disk.errors import OptionError, UnsupportedError

_JOINED = ".in_proj"


def components_only(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Return two checkpoints without what is of no component that adapters change, such as VAEs."""
    prefixes = tuple(component.prefix for component in components_of(base))
    return _below(base, prefixes), _below(tuned, prefixes)


def _below(checkpoint: Checkpoint, prefixes: tuple[str, ...]) -> Checkpoint:
    tensors = {key: t for key, t in checkpoint.tensors.items() if key.startswith(prefixes)}
    return replace(checkpoint, tensors=tensors)


def named_in_single_files(
    adapter: Adapter, base: Checkpoint, tuned: Checkpoint, component: str | None, to: str
) -> tuple[Adapter, tuple[Finding, ...]]:
    """Return what was extracted, with a component before every module.

    Args:
        adapter: with the base's names.
        base: before.
        tuned: after.
        component: what a checkpoint without prefixes is, if it does not tell.
        to: the naming that is wanted; files of diffusers have no place for norms and biases.

    Raises:
        OptionError: it is not known which component a checkpoint is.
        UnsupportedError: an embedding was replaced, or a stack of experts changed.
    """
    components = components_of(base)
    bare = "" if components[0].role else component or _component(base)
    modules: dict[str, ModuleChange] = {}
    for name, change in adapter.modules.items():
        (own,) = _names(name, components, bare)
        modules[own] = change
    additions: dict[str, Addition] = {}
    for replacement in adapter.replacements.values():
        additions |= _added(replacement, base, components, bare)
    findings: tuple[Finding, ...] = ()
    if to == "diffusers" and additions:
        first, count = next(iter(additions)), len(additions) - 1
        more = f" and {count} others" if count else ""
        text = (
            f"norms and biases that changed are left out, for which diffusers' files have no "
            f"place: {first}{more}"
        )
        findings = (Finding("norms-left-out", "warning", first, text),)
        additions = {}
    left_out = _outside(base, tuned, components)
    if left_out:
        text = f"tensors of no component that adapters change are left out: {left_out}"
        findings += (Finding("others-left-out", "note", None, text),)
    named = replace(
        adapter,
        format="safetensors",
        modules=dict(sorted(modules.items())),
        additions=additions,
        replacements={},
        config={},
    )
    return named, findings


def taken_apart(adapter: Adapter) -> Adapter:
    """Return full differences, those of OpenCLIP's joined projections as one for each.

    Each gets a rank of its own, then, as the modules of transformers have that adapters change.
    """
    modules: dict[str, ModuleChange] = {}
    for name, change in adapter.modules.items():
        parent = name.removesuffix(_JOINED)
        if parent == name:
            modules[name] = change
            continue
        delta = change.kind_delta
        assert delta is not None  # it is a full difference
        height = units(name, delta.parts["diff"].shape[0], (1, 1, 1))
        shape = (3 * height, delta.parts["diff"].shape[1])
        whole = change.with_direction(replace(delta, shape=shape))
        for index, part in enumerate("qkv"):
            rows = rows_of(name, whole, index * height, (index + 1) * height)
            modules[f"{parent}.{part}_proj"] = rows
    return replace(adapter, modules=modules)


def _names(name: str, components: list[BaseComponent], bare: str) -> list[str]:
    """Return the names of a module of the base, with their component."""
    component, path = _split(name, components)
    role = component.role or bare
    if role == DENOISER:
        return [f"{component.full_prefix}{path}"]
    if role.startswith("text_encoder"):
        return [f"{role}.{own}" for own in transformers_paths(path)]
    return [f"{role}.{path}"]


def _split(name: str, components: list[BaseComponent]) -> tuple[BaseComponent, str]:
    found = max((c for c in components if name.startswith(c.prefix)), key=lambda c: len(c.prefix))
    return found, name.removeprefix(found.prefix)


def _added(
    replacement: Replacement, base: Checkpoint, components: list[BaseComponent], bare: str
) -> dict[str, Addition]:
    new, key = replacement.tensor, replacement.target
    old = base.tensors.get(key)
    if old is None or old.shape != new.shape or len(new.shape) != 1:
        raise UnsupportedError(
            "a tensor changed, and single files have no place for it",
            path=base.path,
            tensor=key,
            got=f"{new.dtype.code} {list(new.shape)}",
            hint="Leave its module out with `exclude`",
        )
    module, _, leaf = key.rpartition(".")
    fused = leaf.startswith("in_proj_")
    names = _names(f"{module}.in_proj" if fused else module, components, bare)
    leaf = leaf.removeprefix("in_proj_")
    size = new.numel // len(names)
    found = {}
    for index, name in enumerate(names):
        target = f"{name}.{leaf}"
        found[target] = Addition(target, _difference(target, old, new, index * size, size))
    return found


def _difference(key: str, old: TensorRef, new: TensorRef, start: int, size: int) -> TensorRef:
    stop = start + size
    values = new.elements(start, stop).astype(np.float64) - old.elements(start, stop)
    return in_memory(key, values, "F32")


def _component(base: Checkpoint) -> str:
    """Return the component that a checkpoint without prefixes is.

    Raises:
        OptionError: it does not show.
    """
    found = told_component({key.rpartition(".")[0] for key in base.tensors}, base.config)
    if found is None:
        raise OptionError(
            "the checkpoint does not say which component of a pipeline it is",
            path=base.path,
            hint=f"Pass `component`, one of {', '.join(COMPONENTS)} or diffusion_model",
        )
    return found


def _outside(base: Checkpoint, tuned: Checkpoint, components: list[BaseComponent]) -> str:
    """Return the first parts of the names of tensors that are of no component."""
    prefixes = tuple(component.prefix for component in components)
    names = {
        key.partition(".")[0]
        for checkpoint in (base, tuned)
        for key in checkpoint.tensors
        if not key.startswith(prefixes)
    }
    return ", ".join(sorted(names))
