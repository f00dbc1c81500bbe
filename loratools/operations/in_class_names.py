"""Adapters under the names that the base's class has, where PEFT looks for modules.

Modules of another spelling are renamed; parts of what the class fuses or stacks are put together,
and modules that it keeps apart are cut. No ΔW changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.base.dequantised import dequantised
from loratools.base.placement.changes import Placement, Span
from loratools.base.placement.class_view import names_in_class
from loratools.base.placement.names import Names
from loratools.base.placement.orient import stack_is_transposed
from loratools.base.placement.pieces import is_whole, pieces, put_together
from loratools.base.placement.place import has_place, module_placements, unmatched
from loratools.base.placement.sites import sites
from loratools.base.placement.tied_head import with_tied_heads
from loratools_formats.checkpoints import expert_classes
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import DEFAULT_HEAD, head_of
from loratools_formats.contract.commands import command_on
from loratools_formats.core.adapter import Adapter, Replacement
from loratools_formats.core.change import Layer, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import nested_paths, replaced_name, targets
from loratools_formats.disk.errors import AdapterError, UnsupportedError, and_more

_SWITCH = re.compile(
    r"(?P<block>.+)\.(?:switch_mlp|experts)\.(?P<leaf>gate_proj|up_proj|down_proj|fc1|fc2)"
)
_WEIGHT = ".weight"


def in_class_names(
    adapters: Sequence[Adapter], base: Checkpoint, *, as_stored: bool = False
) -> list[Adapter]:
    """Return adapters with modules named and divided as the base's class has them.

    Adapters whose modules are so already are returned as they are. Changes of one module's stacked
    parameters get one nesting in all of them.

    Args:
        adapters: of PEFT or MLX.
        base: the base model.
        as_stored: name and divide them as the base's files do, which is how classes of transformers
            4 did.

    Raises:
        AdapterError: a module fits nothing in the base, or several things.
        UnsupportedError: a change that cannot be cut or put together.
    """
    names = Names(dequantised(base).checkpoint) if as_stored else names_in_class(base)
    adapters = [with_tied_heads(names, adapter) for adapter in adapters]
    changes = [_by_weight(names, adapter, as_stored=as_stored) for adapter in adapters]
    paths = _paths({key for each in changes for key in each})
    return [
        _renamed(names, adapter, {paths[key]: change for key, change in each.items()})
        for adapter, each in zip(adapters, changes, strict=True)
    ]


def renamed_to_class(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Return an adapter of PEFT whose modules have the class's names where only names differ.

    Modules that the class divides otherwise stay as they are, and all of them where two would
    become one. So do those that the base lacks, with a finding that says so.
    """
    if adapter.format != "peft":
        return adapter
    names = names_in_class(base)
    if not names.has_class:
        return adapter
    modules = {_name_in_class(names, m, c): c for m, c in adapter.modules.items()}
    absent = [m for m, c in adapter.modules.items() if not has_place(names, m, c)]
    if absent:
        is_or_are = "are" if len(absent) > 1 else "is"
        text = f"{and_more(absent)} {is_or_are} not in the base, where PEFT drops such changes"
        told = Finding("not-in-base", "warning", absent[0], text)
        adapter = replace(adapter, findings=(*adapter.findings, told))
    return _renamed(names, adapter, modules) if len(modules) == len(adapter.modules) else adapter


def _name_in_class(names: Names, module: str, change: ModuleChange) -> str:
    if change.layer.parameters or names.is_bare(f"{module}{_WEIGHT}"):
        return module
    found = sites(names, module, "weight")
    whole = len(found) == 1 and found[0].is_whole and found[0].key.endswith(_WEIGHT)
    return found[0].key.removesuffix(_WEIGHT) if whole else module


def _by_weight(names: Names, adapter: Adapter, *, as_stored: bool) -> dict[str, ModuleChange]:
    """Return an adapter's changes by the weight in the class that each is all of."""
    found: dict[str, list[tuple[Placement | None, ModuleChange]]] = {}
    missing = []
    for module, change in adapter.modules.items():
        placed = _placed(names, module, change)
        if not placed:
            missing.append(module)
        for key, placement in placed:
            found.setdefault(key, []).append((placement, change))
    if missing:
        raise unmatched(names, missing, adapter)
    return {
        key: _whole(names, adapter, key, members, as_stored=as_stored)
        for key, members in found.items()
    }


def _placed(names: Names, module: str, change: ModuleChange) -> list[tuple[str, Placement | None]]:
    """Return the weights that a module's change goes to; a placement if it is not all of one."""
    if not change.layer.parameters:
        found = sites(names, module, "weight")
        if len(found) == 1 and found[0].is_whole:
            return [(found[0].key, None)]
        if not found:
            head = head_of(sorted(names.types))
            if names.spelling(module) in (head, DEFAULT_HEAD):
                return [(f"{head}.weight", None)]
    placements = _switched(names, module, change) or module_placements(names, module, change)
    if len(placements) == 1 and is_whole(placements[0]):
        return [(placements[0].key, None)]
    return [(placement.key, placement) for placement in placements]


def _switched(names: Names, module: str, change: ModuleChange) -> list[Placement]:
    """Return where the experts of a layer of MLX go, which has a stack for each projection."""
    match = _SWITCH.fullmatch(names.spelling(module))
    if match is None or change.layer.kind != "experts":
        return []
    stack = f"{match['block']}.experts"
    leaf = match["leaf"]
    alone = {
        "down_proj": "down_proj",
        "fc1": "up_proj",
        "fc2": "down_proj",
    }  # Nemotron's have no gate
    if leaf in alone:
        key = names.find(f"{stack}.{alone[leaf]}")
        return [] if key is None else [Placement(key, module, change, transposed=False)]
    key = names.find(f"{stack}.gate_up_proj")
    if key is None:
        return []
    types = set(names.types_of(key))
    transposed = bool(stack_is_transposed(names, key))
    total = names.shape(key)[2 if transposed else 1]
    if change.require_factors().shape[0] * 2 != total:
        raise AdapterError(
            "the experts do not fit the base",
            tensor=module,
            got=f"{change.require_factors().shape[0]} outputs",
            expected=f"half of {total}",
        )
    which = 0 if leaf == "gate_proj" else 1
    outputs: tuple[Span, ...] = ((which * total // 2, (which + 1) * total // 2),)
    if types & expert_classes.ALTERNATING:
        outputs = tuple((i, i + 1) for i in range(which, total, 2))
    return [Placement(key, module, change, transposed=transposed, outputs=outputs)]


def _whole(
    names: Names,
    adapter: Adapter,
    key: str,
    members: Sequence[tuple[Placement | None, ModuleChange]],
    *,
    as_stored: bool,
) -> ModuleChange:
    placements = [placement for placement, _ in members if placement is not None]
    if len(placements) < len(members):
        if len(members) > 1:
            raise AdapterError(
                "two modules of the adapter are one module in the base",
                path=adapter.source,
                tensor=key,
            )
        change = members[0][1]
        # What classes of today have no layer for was one in those of transformers 4.
        is_layer = as_stored or change.is_dora or not names.is_bare(key)
        if is_layer and not change.layer.parameters:
            return change
        layer = replace(change.layer, parameters=(key,))
        return change.with_direction(replace(change.direction, layer=layer))
    if any(change.is_dora for _, change in members):
        raise UnsupportedError(
            "the base splits the module differently, and a DoRA cannot be split or joined",
            path=adapter.source,
            tensor=placements[0].module,
            hint="Make it a plain LoRA first: "
            + command_on(adapter, "to-lora", "--base BASE --rank RANK"),
        )
    shape = names.shape(key)
    transposed = placements[0].transposed
    out, in_ = shape[:-3:-1] if transposed else shape[-2:]
    stack = shape[0] if len(shape) == 3 else None
    if stack is None:
        parameters = () if key.endswith(_WEIGHT) else (key,)
        layer = Layer("linear", parameters=parameters, transposed_if_square=transposed)
    else:
        lies = stack_is_transposed(names, key)
        swapped = None if lies is None else lies != transposed
        layer = Layer("experts", (), (key,), transposed_if_square=transposed, swapped=swapped)
    parts = [piece for placement in placements for piece in pieces(placement)]
    return ModuleChange(put_together(parts, stack, (out, in_), layer))


def _paths(keys: set[str]) -> dict[str, str]:
    """Return PEFT's paths of weights."""
    stacked: dict[str, list[str]] = {}
    paths = {}
    for key in sorted(keys):
        parent, _, leaf = key.rpartition(".")
        if leaf == "weight":
            paths[key] = parent
        else:
            stacked.setdefault(parent, []).append(key)
    for parent, group in stacked.items():
        paths |= nested_paths(parent, group)
    return paths


def _renamed(names: Names, adapter: Adapter, modules: Mapping[str, ModuleChange]) -> Adapter:
    additions = {
        key: replace(addition, target=_target(names, addition.target))
        for key, addition in adapter.additions.items()
    }
    replacements = _replacements(names, adapter, modules)
    same = all(modules.get(name) is change for name, change in adapter.modules.items())
    if same and replacements.keys() == adapter.replacements.keys():
        return adapter
    ordered = {name: modules[name] for name in sorted(modules)}
    return replace(
        adapter,
        modules=ordered,
        additions=additions,
        replacements=replacements,
        config=_config(names, adapter, ordered, replacements),
    )


def _target(names: Names, target: str) -> str:
    return names.find(target) or target


def _replacements(
    names: Names, adapter: Adapter, modules: Mapping[str, ModuleChange]
) -> dict[str, Replacement]:
    renamed = {}
    for key, replacement in adapter.replacements.items():
        target = _target(names, replacement.target)
        if target == replacement.target and set(modules) == set(adapter.modules):
            renamed[key] = replacement
            continue
        name = replaced_name(target, modules)
        if replacement.rows:
            name = f"{name.removesuffix(_WEIGHT)}.token_adapter.trainable_tokens_delta"
        renamed[name] = replace(replacement, target=target)
    return renamed


def _config(
    names: Names,
    adapter: Adapter,
    modules: Mapping[str, ModuleChange],
    replacements: Mapping[str, Replacement],
) -> Mapping[str, object]:
    """Return a PEFT configuration for modules under new names; others stay as they are."""
    if adapter.format != "peft":
        return adapter.config
    config = dict(adapter.config)
    of_parameters = sorted({p for change in modules.values() for p in change.layer.parameters})
    config["target_modules"] = targets(
        (name for name, change in modules.items() if not change.layer.parameters),
        (key.rpartition(".")[0] for key in names.tensors),
    )
    if of_parameters or config.get("target_parameters"):
        config["target_parameters"] = of_parameters
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if config.get(key) is not None:
            config[key] = None
    whole = {r.target.rpartition(".")[0] for r in replacements.values() if r.kind == "module"}
    if whole and config.get("modules_to_save"):
        config["modules_to_save"] = sorted(whole)
    return config
