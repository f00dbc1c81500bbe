"""Bring an adapter's experts into the layout that is asked for, and say what that loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from loratools.base.placement import rules
from loratools.operations.convert.experts.apart import (
    of_one_rank,
    rounds,
    shared_outer,
)
from loratools.operations.convert.experts.counts import counted, told_count
from loratools.operations.convert.experts.each import each
from loratools.operations.convert.experts.filled import complete, filled, with_zeros
from loratools.operations.convert.experts.groups import (
    Group,
    Order,
    Sorted,
    base_hint,
    has_gate,
    order_of,
    refuse_no_pairs,
    sorted_experts,
    types_of,
)
from loratools.operations.convert.experts.recent import Recent
from loratools.operations.convert.experts.stacked import nested, stacked
from loratools.operations.convert.experts.stored_names import in_stored_names
from loratools.operations.convert.experts.tinker_names import in_tinker_names
from loratools.operations.convert.options import PeftLayout
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.orientation import exchanged
from loratools_formats.core.peft_facts import B_LAYOUT, RANK_MAJOR
from loratools_formats.disk.errors import UnsupportedError

ExpertLayoutName = Literal["stacked", "each", "3d", "shared-outer", "tinker"]
_OLD, _NEW = "0.18.1", "0.19.1"


@dataclass(frozen=True)
class Wanted:
    """What to make of experts.

    Attributes:
        layout: its name; None to leave them as they are, but for what no program reads any more.
        peft: the release of PEFT whose side of A is written.
        complete: whether a layer needs all of its projections, with zeros where it has none.
        uniform: whether all modules need one rank and one scale.
        marked: whether the configuration says that lora_B is rank by rank.
    """

    layout: ExpertLayoutName | None = None
    peft: PeftLayout | None = None
    complete: bool = False
    uniform: bool = False
    marked: bool = False

    @property
    def is_given(self) -> bool:
        """Whether anything was asked for."""
        return self != Wanted()

    def record(self) -> dict[str, Any]:
        """Return what determines the output, for its provenance."""
        values = {"experts": self.layout, "peft_layout": self.peft}
        return {key: value for key, value in values.items() if value is not None}


def laid_out(
    adapter: Adapter, wanted: Wanted, base: Checkpoint | None
) -> tuple[Adapter, tuple[Finding, ...]]:
    """Return an adapter of PEFT with its experts as they are wanted.

    Args:
        adapter: in the names of the model.
        wanted: what is asked for.
        base: the base model, where the number of experts or the order of gate and up needs it.

    Raises:
        UnsupportedError: the layout cannot hold the experts exactly, or the base must tell more.
    """
    if not wanted.is_given and not _has_other_sides(adapter, base):
        return adapter, ()
    found = sorted_experts(adapter, base)
    refuse_no_pairs(adapter, found, wanted.layout)
    if not found.groups and wanted.layout != "tinker":
        return _rest(adapter, wanted, found.others, ())
    made, told = _MAKERS[wanted.layout or _own(found)](adapter, wanted, found, base)
    if wanted.complete:
        gated = any(has_gate(adapter, group, base) for group in found.groups.values())
        made = filled(made, gated=gated)
    if wanted.layout == "each":
        made = in_stored_names(adapter, made, base)
    kept = adapter if set(made) == set(adapter.modules) else retargeted(adapter, made)
    as_layout: str = wanted.layout if wanted.layout in _PACKED else ""
    if as_layout == "tinker" and "gpt_oss" in types_of(adapter, base):
        as_layout = "tinker-attn"
    kept = replace(kept, write_as=as_layout)
    return _rest(kept, wanted, made, told)


def _has_other_sides(adapter: Adapter, base: Checkpoint | None) -> bool:
    """Return whether PEFT may have A of some stack on the other side than the file has it."""
    sides = {c.layer.swapped for c in adapter.modules.values() if c.layer.kind == "experts"}
    is_unmarked = bool(types_of(adapter, base) & rules.UNMARKED_TRANSPOSED) if sides else False
    return True in sides or (is_unmarked and False in sides)


_Made = tuple[dict[str, ModuleChange], tuple[Finding, ...]]
_PACKED = ("3d", "shared-outer", "tinker")


def _own(found: Sorted) -> ExpertLayoutName:
    return "stacked" if any(group.stacks for group in found.groups.values()) else "each"


def _rest(
    adapter: Adapter,
    wanted: Wanted,
    modules: Mapping[str, ModuleChange],
    told: tuple[Finding, ...],
) -> tuple[Adapter, tuple[Finding, ...]]:
    made = dict(modules)
    plain = {n: c for n, c in made.items() if c.factors is not None and not c.is_dora}
    parts = [change.require_factors() for change in plain.values()]
    if wanted.uniform and len({(p.rank, p.scale) for p in parts}) > 1:
        made |= of_one_rank(plain)
        ranks = sorted({part.rank for part in parts})
        text = f"all modules get rank {ranks[-1]} with zeros, and one scale folded into B"
        text += ", which rounds once" if rounds(parts) else ""
        told = (*told, Finding("experts-laid-out", "note", None, text))
    ordered = {name: made[name] for name in sorted(made)}
    return replace(adapter, modules=ordered), told


def _as_stacked(adapter: Adapter, wanted: Wanted, found: Sorted, base: Checkpoint | None) -> _Made:
    found = Sorted({o: _gated(adapter, g, base) for o, g in found.groups.items()}, found.others)
    made = dict(found.others)
    told: list[Finding] = []
    order: Order | None = None
    if any({"gate_proj", "gate_up_proj"} & set(g.single) for g in found.groups.values()):
        order, why = order_of(adapter, found.groups, base)
        told += why
    experts = counted(adapter, found.groups, base)
    told += told_count(experts, base)
    turned = 0
    for owner, group in found.groups.items():
        stacks = stacked(group, order, experts.get(owner, 0))
        modules, count = _on_side(adapter, stacks, wanted, base, owner)
        made |= modules
        turned += count
    if turned:
        swapped = any(change.layer.swapped for change in made.values())
        told.append(_told_turn(wanted, turned, swapped=swapped))
    return made, tuple(told)


def _gated(adapter: Adapter, group: Group, base: Checkpoint | None) -> Group:
    """Return a layer that has zeros for a gate if up is adapted alone.

    Raises:
        UnsupportedError: whether the model has a gate is not told.
    """
    if "up_proj" not in group.single:
        return group
    gated = has_gate(adapter, group, base)
    if gated is None:
        raise UnsupportedError(
            "whether the experts of the model have a gate, which is joined with up, is not known",
            path=adapter.source,
            tensor=group.owner,
            got="up alone",
            hint=base_hint(adapter),
        )
    return with_zeros(group, 0, gated=gated)


def _told_turn(wanted: Wanted, turned: int, *, swapped: bool) -> Finding:
    was, is_now = ("inputs", "outputs") if swapped else ("outputs", "inputs")
    if wanted.peft == "0.18":
        text = f"A of {turned} stacks is now on the {is_now}, as PEFT 0.17 and 0.18 read it"
    else:
        text = (
            f"A of {turned} stacks was on the {was}, which PEFT 0.19.1 and later refuse or read "
            f"wrongly; it is on the {is_now} now"
        )
    return Finding("experts-laid-out", "note", None, text)


def _on_side(
    adapter: Adapter,
    modules: dict[str, ModuleChange],
    wanted: Wanted,
    base: Checkpoint | None,
    owner: str,
) -> tuple[dict[str, ModuleChange], int]:
    """Return stacks with A on the side where a release of PEFT has it, and how many were turned."""
    wants_swapped = _swaps(adapter, wanted, base, owner)
    types = types_of(adapter, base)
    lies = bool(types & (rules.TRANSPOSED_EXPERTS | rules.UNMARKED_TRANSPOSED)) if types else None
    made, turned = {}, 0
    for path, change in modules.items():
        was = adapter.modules.get(path)
        before = bool(was is not None and was.layer.swapped)
        swapped = before if wants_swapped is None else wants_swapped
        part = change.require_factors()
        if part.layer.kind == "experts":
            part = exchanged(part) if swapped else part
            layer = replace(part.layer, swapped=swapped)
            if lies is not None:
                layer = replace(layer, transposed_if_square=swapped != lies)
            part = replace(part, layer=layer)
        made[path] = change.with_direction(part)
        turned += was is not None and before != swapped
    return made, turned


def _swaps(adapter: Adapter, wanted: Wanted, base: Checkpoint | None, owner: str) -> bool | None:
    """Return whether a release of PEFT has A on the outputs; None to leave it where it is."""
    types = types_of(adapter, base)
    if wanted.peft == "0.18":
        if not types:
            raise UnsupportedError(
                "in PEFT 0.18 the side of A depends on the model, and the model is not known",
                path=adapter.source,
                tensor=owner,
                hint=base_hint(adapter),
            )
        return not types & (rules.TRANSPOSED_EXPERTS | rules.UNMARKED_TRANSPOSED)
    if types:
        return bool(types & rules.UNMARKED_TRANSPOSED)
    if owner.endswith("feed_forward.experts"):  # Llama 4's, the only class of the other side
        if wanted.peft is not None:
            raise UnsupportedError(
                "PEFT 0.19.1 puts A on the outputs of Llama 4 only, and the model is not known",
                path=adapter.source,
                tensor=owner,
                hint=base_hint(adapter),
            )
        return None
    return False


def _as_each(adapter: Adapter, wanted: Wanted, found: Sorted, base: Checkpoint | None) -> _Made:
    del wanted
    made = dict(found.others)
    order: Order = "halves"
    told: tuple[Finding, ...] = ()
    if any("gate_up_proj" in group.stacks for group in found.groups.values()):
        order, told = order_of(adapter, found.groups, base)
    recent = Recent()
    for group in found.groups.values():
        made |= each(group, order, recent, trimmed=adapter.format == "gguf")
    return made, told


def _as_3d(adapter: Adapter, wanted: Wanted, found: Sorted, base: Checkpoint | None) -> _Made:
    made = dict(found.others)
    experts = counted(adapter, found.groups, base)
    told = told_count(experts, base)
    rounded: list[str] = []
    for owner, adapted in found.groups.items():
        if adapted.single and adapted.stacks:
            raise UnsupportedError(
                "the adapter has these experts both one by one and as a stack",
                path=adapter.source,
                tensor=owner,
            )
        group = complete(adapter, adapted, experts, base)
        if group.stacks and not set(group.stacks) <= _JOINED:
            group = _apart(group)  # whose projections are read one by one
        elif group.single and set(group.single) <= _JOINED:  # read as parameters
            order: Order | None = None
            if "gate_up_proj" in group.single:
                order, why = order_of(adapter, found.groups, base)
                told += [finding for finding in why if finding not in told]
            stacks = stacked(group, order, experts[owner])
            group = Group(
                owner, {c.layer.parameters[0].rpartition(".")[2]: c for c in stacks.values()}
            )
        if wanted.layout == "shared-outer":
            shared_outer(group)
        made |= nested(owner, group.stacks)
        for leaf, changes in group.single.items():
            named = {f"{owner}.{expert}.{leaf}": change for expert, change in changes.items()}
            if rounds(change.require_factors() for change in changes.values()):
                rounded.append(f"{owner}.{leaf}")
            made |= of_one_rank(named)
    text = "scales of experts differ by no power of two; they are folded into B, which rounds once"
    if rounded:
        told.append(Finding("experts-laid-out", "note", rounded[0], text))
    return made, tuple(told)


_JOINED = {"gate_up_proj", "down_proj"}


def _apart(group: Group) -> Group:
    """Return a layer without gate, with its stacks as single experts."""
    singles: dict[str, dict[int, ModuleChange]] = {}
    for path, change in each(group, "halves", Recent()).items():
        index, leaf = path.removeprefix(f"{group.owner}.").split(".")
        singles.setdefault(leaf, {})[int(index)] = change
    return Group(group.owner, single=singles)


def _as_tinker(adapter: Adapter, wanted: Wanted, found: Sorted, base: Checkpoint | None) -> _Made:
    """Return experts one by one, which the writer stacks under Tinker's names."""
    made, told = _as_each(adapter, wanted, found, base)
    made, alone = in_tinker_names(adapter, made, base)
    told = (*told, *alone)
    apart = sorted_experts(replace(adapter, modules=made), None)
    experts = counted(adapter, apart.groups, base)
    if any(group.single for group in found.groups.values()):
        told = (*told, *told_count(experts, base))
    full = None
    for owner, adapted in apart.groups.items():
        group = complete(adapter, adapted, experts, base)
        for leaf, changes in group.single.items():
            made |= {f"{owner}.{expert}.{leaf}": change for expert, change in changes.items()}
        try:
            shared_outer(group)
        except UnsupportedError:
            full = owner
    if full is not None:
        text = (
            "experts do not share their outer factors, so that each has its own in the file; "
            "whether Tinker imports such a file is not known"
        )
        told = (*told, Finding("experts-laid-out", "warning", full, text))
    return made, told


_MAKERS = {
    "stacked": _as_stacked,
    "each": _as_each,
    "3d": _as_3d,
    "shared-outer": _as_3d,
    "tinker": _as_tinker,
}


def retargeted(adapter: Adapter, modules: Mapping[str, ModuleChange]) -> Adapter:
    """Return an adapter of PEFT whose configuration names other modules."""
    if adapter.format != "peft":
        return adapter
    plain = [name for name, change in modules.items() if not change.layer.parameters]
    parameters = {p for change in modules.values() for p in change.layer.parameters}
    config = {k: v for k, v in adapter.config.items() if k not in _NARROWING}
    config["target_modules"] = sorted({_last(name) for name in plain})
    config.pop("target_parameters", None)
    if parameters:
        config["target_parameters"] = sorted(parameters)
    return replace(adapter, config=config)


_NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def _last(name: str) -> str:
    *_, last = parts = name.split(".")
    return ".".join(parts[-2:]) if last.isdigit() else last


def stated(adapter: Adapter, wanted: Wanted) -> Adapter:
    """Return an adapter of PEFT whose configuration says what was written, if it must.

    That is the release whose side of A it is, and the order of lora_B. Others are returned as they
    are: their configuration is made later.
    """
    if adapter.format != "peft":
        return adapter
    config = dict(adapter.config)
    version = str(config.get("peft_version") or "")
    is_unsaid = wanted.peft is not None and not version
    if wanted.peft == "0.18":
        config["peft_version"] = _OLD
    elif is_unsaid or version.startswith(("0.17", "0.18", "0.19.0")):
        config["peft_version"] = _NEW
    if wanted.marked and any(c.layer.kind == "experts" for c in adapter.modules.values()):
        config[B_LAYOUT] = RANK_MAJOR
    return replace(adapter, config=config)
