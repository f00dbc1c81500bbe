"""The names of the target and the layout of experts, in the order that keeps factors as they are.

Names of a class stack experts and a layout may take them apart again, which would pad what differs;
single experts are therefore laid out first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from loratools.base.placement.class_view import names_in_class
from loratools.base.placement.tied_head import as_class_has_heads
from loratools.folding.expert_sides import lacks_sides, with_sides
from loratools.operations.convert.class_names import checkpoint_of
from loratools.operations.convert.experts.apart import of_one_rank
from loratools.operations.convert.experts.choice import wanted_by
from loratools.operations.convert.experts.each import each
from loratools.operations.convert.experts.groups import (
    base_hint,
    sorted_experts,
    straightened,
    types_of,
)
from loratools.operations.convert.experts.layouts import Wanted, laid_out, retargeted, stated
from loratools.operations.convert.experts.recent import Recent
from loratools.operations.convert.experts.tinker_names import with_whole_projections
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import Layer, ModuleChange
from loratools_formats.core.expert_names import TO_MIXTRAL
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import ALL_LINEAR
from loratools_formats.core.peft_on_load import about_load, not_converted
from loratools_formats.disk.errors import OptionError, UnsupportedError

_APART = ("each", "3d", "shared-outer", "tinker")
_SWITCH = re.compile(
    r"(?P<block>.*)\.(?:switch_mlp|experts)\.(?P<leaf>gate_proj|up_proj|down_proj|fc1|fc2)"
)
_OF_FC = {"fc1": "up_proj", "fc2": "down_proj"}


def in_layout(
    adapter: Adapter,
    target: str,
    base: Path | None,
    experts: Wanted | str | None,
    in_names: Callable[[Adapter], Adapter],
    names_of: str | None = None,
) -> tuple[Adapter, Wanted, tuple[Finding, ...]]:
    """Return an adapter in the target's names and layout, what was wanted, and what to tell.

    Args:
        adapter: as read.
        target: the format to write.
        base: the base model.
        experts: what is wanted, or the program that says it.
        in_names: gives an adapter the target's names.
        names_of: the version of transformers whose names those are, if one was asked for.

    Raises:
        OptionError: a layout is asked for in a format that has none to choose, or that has no such
            names.
        UnsupportedError: the layout cannot hold the experts exactly, or the base must tell more.
    """
    asks = target in ("peft", "mlx") or (target == "gguf" and lacks_sides(adapter))
    checkpoint = checkpoint_of(adapter, base) if asks else None
    wanted = experts
    if isinstance(experts, str):
        wanted = wanted_by(experts, adapter, checkpoint)
    if not isinstance(wanted, Wanted):
        wanted = Wanted()
    if target != "peft" and (wanted.layout is not None or wanted.peft is not None):
        raise OptionError(
            "layouts of experts are those of PEFT folders", got=target, expected="`to=peft`"
        )
    _check_names(names_of, wanted)
    if wanted.layout != "tinker" and adapter.format == "peft":
        adapter, whole = with_whole_projections(adapter, checkpoint)
        if whole:
            adapter = retargeted(adapter, {**adapter.modules, **whole})
            adapter = replace(adapter, modules={**adapter.modules, **whole})
    if target == "peft" and wanted.layout != "tinker":
        adapter = as_class_has_heads(adapter, checkpoint)
    if target == "mlx":
        return _uniform(in_names(straightened(adapter, checkpoint))), wanted, ()
    adapter = with_sides(adapter, checkpoint)
    if target != "peft":
        return in_names(_one_by_one(adapter) if target == "gguf" else adapter), wanted, ()
    model, told = _for_peft(adapter, wanted, checkpoint, in_names, names_of)
    types = types_of(adapter, checkpoint)
    if not_converted(types) is not None and not isinstance(experts, str):
        told = (*told, *about_load(model, types, model.config))
    return model, wanted, told


def _for_peft(
    adapter: Adapter,
    wanted: Wanted,
    checkpoint: Checkpoint | None,
    in_names: Callable[[Adapter], Adapter],
    names_of: str | None,
) -> tuple[Adapter, tuple[Finding, ...]]:
    model, told = _in_wanted(adapter, wanted, checkpoint, in_names, names_of)
    if wanted.layout != "tinker" and model.config.get("target_modules") == ALL_LINEAR:
        model = retargeted(model, model.modules)  # PEFT counts neither embeddings nor heads
    return model, told


def _in_wanted(
    adapter: Adapter,
    wanted: Wanted,
    checkpoint: Checkpoint | None,
    in_names: Callable[[Adapter], Adapter],
    names_of: str | None,
) -> tuple[Adapter, tuple[Finding, ...]]:
    if wanted.layout in _APART:
        singles = _singles(adapter, checkpoint, in_names)
        _refuse_flat(singles)
        if names_of is not None or (adapter.format == "mlx" and checkpoint is not None):
            singles = _others_in(singles, in_names)
        return _laid(singles, wanted, checkpoint)
    if adapter.format == "mlx" and names_of == "4":  # whose experts are one by one in most files
        adapter = _from_switch(adapter, checkpoint)
    named = in_names(adapter)
    if names_of == "4" and wanted.layout == "stacked":
        _refuse_singles(named)
    model, told = _laid(named, wanted, checkpoint)
    return model, (*told, *_of_larger_rank(adapter, model))


def _check_names(names_of: str | None, wanted: Wanted) -> None:
    if names_of is not None and wanted.layout not in (None, "stacked", "each"):
        raise OptionError(
            "`names_of` is for names of PEFT's modules, and this layout of experts has its own",
            got=wanted.layout,
            expected="`experts=each`, `experts=stacked` or none",
        )


def _refuse_singles(adapter: Adapter) -> None:
    single = next((g for g in sorted_experts(adapter, None).groups.values() if g.single), None)
    if single is not None:
        raise OptionError(
            "classes of transformers 4 have these experts one by one",
            got=f"`experts=stacked` and `names_of=4` of {single.owner}",
            expected="`experts=each`, or `names_of=5`",
        )


def _others_in(adapter: Adapter, in_names: Callable[[Adapter], Adapter]) -> Adapter:
    """Return an adapter whose modules but for experts have the target's names."""
    others = {n: c for n, c in adapter.modules.items() if not _OF_EXPERTS.search(n)}
    config = {**adapter.config, "target_parameters": None}
    named = in_names(replace(adapter, modules=others, config=config))
    experts = {n: c for n, c in adapter.modules.items() if n not in others}
    modules = {**named.modules, **experts}
    return retargeted(replace(named, modules=modules), modules)


def _of_larger_rank(before: Adapter, after: Adapter) -> list[Finding]:
    """Return findings about stacks that hold gate's and up's own factors, one beside the other."""
    ranks = [c.rank or 0 for name, c in before.modules.items() if _OF_EXPERTS.search(name)]
    largest = max(ranks, default=0)
    larger = [
        (name, change.rank)
        for name, change in after.modules.items()
        if change.layer.kind == "experts" and (change.rank or 0) > largest > 0
    ]
    if not larger:
        return []
    name, rank = larger[0]
    text = (
        f"gate and up have factors A of their own: {name} has rank {rank} instead of {largest}, "
        f"half of its B zeros, and {len(larger)} stacks in all have"
    )
    hint = f"`squeeze` with `rank={largest}` shortens it, which is not exact"
    return [Finding("experts-laid-out", "note", name, text, hint)]


_OF_EXPERTS = re.compile(r"\b(?:experts|switch_mlp)\b")


def _singles(
    adapter: Adapter, base: Checkpoint | None, in_names: Callable[[Adapter], Adapter]
) -> Adapter:
    """Return an adapter whose names lead to single experts; those of MLX and PEFT stay apart.

    Raises:
        UnsupportedError: its experts have no such names.
    """
    _refuse_flat(adapter)
    if adapter.format == "mlx":
        return _from_switch(adapter, base)
    if adapter.format == "peft":
        if not _has_old_stacks(adapter):
            return adapter
        if base is None:
            raise UnsupportedError(
                "these stacks have names of transformers 4, and only the base shows what they hold",
                path=adapter.source,
                hint=base_hint(adapter),
            )
    return in_names(adapter) if adapter.format in ("gguf", "peft") else adapter


_IN_ONE = re.compile(r"(?:^|\.)experts\.(?:mlp\.)?[a-z0-9_]+$")


def _refuse_flat(adapter: Adapter) -> None:
    """Refuse experts that the model keeps below each other in one matrix, as DBRX does.

    Raises:
        UnsupportedError: there are some.
    """
    for change in adapter.modules.values():
        for parameter in change.layer.parameters:
            if change.layer.kind != "experts" and _IN_ONE.search(parameter):
                raise UnsupportedError(
                    "experts of this model share a factor in one matrix, and no layout but PEFT's "
                    "own holds them",
                    path=adapter.source,
                    tensor=parameter,
                    hint="Leave out `experts`, or keep them stacked: `experts=stacked` is exact",
                )


def _has_old_stacks(adapter: Adapter) -> bool:
    """Return whether stacks are called as Granite's and Aria's are on transformers 4."""
    return any(
        change.layer.kind == "experts" and parameter.endswith((".weight", ".fc1", ".fc2"))
        for change in adapter.modules.values()
        for parameter in change.layer.parameters
        if adapter.format == "peft"
    )


def _one_by_one(adapter: Adapter) -> Adapter:
    """Return an adapter whose stacks of MLX, and joined gate and up, are single projections."""
    if adapter.format == "mlx":
        return _from_switch(adapter, None)
    found = sorted_experts(replace(adapter, modules=_joined_singles(adapter)), None)
    if not found.groups:
        return adapter
    modules = {n: c for n, c in adapter.modules.items() if n not in _joined_singles(adapter)}
    for group in found.groups.values():
        modules |= each(group, "halves", Recent())
    return replace(adapter, modules=modules)


def _joined_singles(adapter: Adapter) -> dict[str, ModuleChange]:
    return {n: c for n, c in adapter.modules.items() if _JOINED.fullmatch(n)}


_JOINED = re.compile(r"(?:.*\.)?experts\.\d+\.gate_up_proj")


def _laid(
    adapter: Adapter, wanted: Wanted, base: Checkpoint | None
) -> tuple[Adapter, tuple[Finding, ...]]:
    model, told = laid_out(adapter, wanted, base)
    return (stated(model, wanted) if told or wanted.is_given else model), told


def _uniform(adapter: Adapter) -> Adapter:
    """Return an adapter of one rank and scale, which is all that mlx-lm loads."""
    parts = [change.factors for change in adapter.modules.values()]
    settings = {None if part is None else (part.rank, part.scale) for part in parts}
    if None in settings or len(settings) < 2:
        return adapter
    return replace(adapter, modules=of_one_rank(adapter.modules))


def _from_switch(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter of MLX with its stacks as single experts, under PEFT's names for them.

    Args:
        adapter: of MLX.
        base: the base model, whose class has a name of its own for the module that holds them.
    """
    names = None if base is None else names_in_class(base)
    modules: dict[str, ModuleChange] = {}
    for name, change in adapter.modules.items():
        match = _SWITCH.fullmatch(name if names is None else names.spelling(name))
        if match is None or change.layer.kind != "experts":
            modules[name] = change
            continue
        part = change.require_factors()
        leaf = _OF_FC.get(match["leaf"], match["leaf"])
        owner = f"{match['block']}.experts"
        key = None if names is None else names.find(f"{owner}.down_proj")
        if key is not None:
            owner = key.rpartition(".")[0]
        elif match["block"].endswith(".block_sparse_moe"):
            leaf = TO_MIXTRAL[leaf]
        for expert in range(part.experts):
            single = replace(
                part, a=part.a.matrix(expert), b=part.b.matrix(expert), layer=Layer("linear")
            )
            modules[f"{owner}.{expert}.{leaf}"] = ModuleChange(single)
    return replace(adapter, modules=modules)
