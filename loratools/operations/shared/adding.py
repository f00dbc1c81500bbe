"""`add`: another adapter in the bases that a set has already.

The bases stay bit for bit, and so do all cores. The newcomer gets the cores that fit it best in the
group whose bases lose least of it: a member that is added again gets the cores that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.algebra.joint import Triplets
from loratools.operations.merge.align import MergeInput, align
from loratools.operations.shared.alone import total
from loratools.operations.shared.bases import fitted, stored_bases
from loratools.operations.shared.members import (
    Entrant,
    entrant,
    left_beside,
    member_of,
    triplets_of,
)
from loratools.operations.shared.operation import as_shelf
from loratools.work.declared import option
from loratools.work.parallel import done_in_order
from loratools.work.provenance import operation_record
from loratools.work.requests import Progress
from loratools.work.scratch import Scratch
from loratools.work.typed import check_options
from loratools_formats.contract.commands import command_on
from loratools_formats.contract.shared_set import Part, SharedModule, SharedSet
from loratools_formats.contract.shared_set_read import parsed
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import LowRank, ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef, unmade
from loratools_formats.disk.errors import AdapterError, OptionError


@dataclass(frozen=True)
class AddOptions:
    """How to add an adapter.

    Attributes:
        name: the name of the new member; by default that of its file or folder.
        group: the group that it joins; by default the one whose bases lose least of it.
        force_base: add an adapter that names another base model.
    """

    name: str | None = option(None, heading="Method")
    group: int | None = option(None, heading="Method")
    force_base: bool = option(False, heading="Input")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class AddedModule:
    """One module of the adapter that was added.

    Attributes:
        name: module path.
        rank: of the bases.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of what is stored.
    """

    name: str
    rank: int
    relative_error: float


@dataclass(frozen=True)
class Added:
    """A set with one adapter more, not yet written.

    Attributes:
        adapter: the set.
        name: that the new member goes by.
        group: whose bases it has.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the new member.
        group_errors: what it would be in each group's bases; None where they lack a module.
        modules: one report each.
        findings: what a user should know.
    """

    adapter: Adapter
    name: str
    group: int
    relative_error: float
    group_errors: tuple[float | None, ...]
    modules: tuple[AddedModule, ...]
    findings: tuple[Finding, ...]


def add(
    shelf: Adapter,
    adapter: Adapter,
    name: str,
    options: AddOptions,
    *,
    workers: int = 1,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> Added:
    """Add an adapter to a set.

    Args:
        shelf: the set's file, as read.
        adapter: the newcomer.
        name: that it will go by.
        options: how to add it.
        workers: threads over modules.
        scratch_folder: where cores wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: the name is taken, there is no such group, or another base model.
        AdapterError: no group has all its modules, or they differ.
        UnsupportedError: it is no set, or the adapter is a DoRA or does not fold.
    """
    shared = parsed(shelf)
    new = entrant(name, adapter, scratch_folder)
    if name.casefold() in {member.name.casefold() for member in shared.members}:
        raise OptionError(
            "the set has an adapter of that name", got=name, hint="Give it another by `name`"
        )
    group = options.group
    if group is not None and not 0 <= group < shared.groups:
        raise OptionError("no such group", got=group, expected=f"from 0 to {shared.groups - 1}")
    changes = _matching(shared, new, options.force_base)
    scratch = Scratch(scratch_folder)
    wanted = range(shared.groups) if group is None else [group]

    def one(module: str) -> tuple[float, dict[int, tuple[TensorRef, float]]]:
        factors = changes[module].require_factors()
        triplets = triplets_of(module, factors, new.source.source)
        fits = {
            place: _fit(module, shared.modules[module].parts[place], triplets, shared, scratch)
            for place in wanted
            if place in shared.modules[module].parts
        }
        return sum(each.squared_norm for each in triplets), fits

    found = dict(zip(changes, done_in_order(one, changes, workers, progress), strict=True))
    norm = float(sum(size for size, _ in found.values()))
    if not norm > 0.0:
        raise AdapterError(
            "the adapter changes nothing: all its weight changes are zero",
            path=adapter.source,
            hint="Leave it out",
        )
    errors = [
        total([fits[place][1] for _, fits in found.values()], [norm])
        if all(place in fits for _, fits in found.values())
        else None
        for place in range(shared.groups)
    ]
    known = [(error, place) for place, error in enumerate(errors) if error is not None]
    if not known:
        raise _lacking(shared, new, wanted)
    least, best = min(known)
    chosen = {module: fits[best] for module, (_, fits) in found.items()}
    whole = _with_member(shared, new, best, least, chosen, scratch)
    values = {"name": name, "group": best}
    record = operation_record("fleet-add", {"shared": shelf, "source": new.source}, values)
    return Added(
        adapter=as_shelf(whole, record, (*shelf.inputs, *new.source.inputs)),
        name=name,
        group=best,
        relative_error=least,
        group_errors=tuple(errors),
        modules=tuple(
            AddedModule(
                module,
                shared.modules[module].parts[best].rank,
                total([error], [found[module][0]]),
            )
            for module, (_, error) in chosen.items()
        ),
        findings=(*new.source.notices, *left_beside([new])),
    )


def _matching(shared: SharedSet, new: Entrant, force_base: bool) -> dict[str, ModuleChange]:
    """Return the newcomer's changes as the set has its modules.

    Raises:
        AdapterError: the set lacks a module, or has it in another shape.
        OptionError: another base model.
    """
    missing = [name for name in new.adapter.modules if name not in shared.modules]
    if missing:
        raise AdapterError(
            f"the set has no bases for {len(missing)} of the adapter's modules",
            path=new.source.source,
            tensor=missing[0],
            hint="Share it together with the others: loratools fleet share ADAPTERS -o NEW "
            "--rank RANK; or leave the modules out with `drop`",
        )
    plan = Adapter(
        format="peft",
        source=None,
        modules={name: _planned(shared.modules[name]) for name in new.adapter.modules},
        base_model=shared.base_model,
    )
    inputs = [MergeInput(plan, 1.0, "set"), MergeInput(new.adapter, 1.0, new.name)]
    aligned = align(inputs, force_base=force_base)
    changes = {module.name: module.deltas[1] for module in aligned}
    return {name: change for name, change in changes.items() if change is not None}


def _planned(module: SharedModule) -> ModuleChange:
    """Return the change of a module as a set has it: shapes, and no values."""
    part = next(iter(module.parts.values()))
    (out, in_), stack = part.shape, (part.experts,) if module.layer.kind == "experts" else ()
    a = unmade(module.name, part.v.dtype, (*stack, 1, in_))
    b = unmade(module.name, part.u.dtype, (*stack, out, 1))
    return ModuleChange(LowRank(a, b, 1.0, module.layer))


def _fit(
    name: str, part: Part, triplets: list[Triplets], shared: SharedSet, scratch: Scratch
) -> tuple[TensorRef, float]:
    """Return the core of a module in the bases of a group, and its squared error."""
    stored = stored_bases(part, diagonal=shared.diagonal)
    core, error = fitted(name, stored, triplets, part.cores.dtype)
    return scratch.store(name, core, part.cores.dtype), error


def _lacking(shared: SharedSet, new: Entrant, groups: range | list[int]) -> AdapterError:
    name = next(
        module
        for module in new.adapter.modules
        if any(place not in shared.modules[module].parts for place in groups)
    )
    return AdapterError(
        "no group of the set has bases for all modules of the adapter",
        path=new.source.source,
        tensor=name,
        hint="Share it together with the others: "
        + command_on(None, "fleet share", "--clusters 1 --rank RANK", output="NEW.safetensors"),
    )


def _with_member(
    shared: SharedSet,
    new: Entrant,
    group: int,
    error: float,
    chosen: Mapping[str, tuple[TensorRef, float]],
    scratch: Scratch,
) -> SharedSet:
    place = len(shared.members)
    modules = dict(shared.modules)
    for name, (core, _) in chosen.items():
        module = modules[name]
        part = module.parts[group]
        shape = (len(part.members) + 1, *part.cores.shape[1:])
        cores = TensorRef(name, part.cores.dtype, shape, _Joined(part.cores, core))
        more = replace(part, cores=cores, members=(*part.members, place))
        modules[name] = replace(module, parts={**module.parts, group: more})
    member = member_of(new, group, error, scratch)
    base = shared.base_model if shared.base_model is not None else new.adapter.base_model
    return replace(shared, modules=modules, members=(*shared.members, member), base_model=base)


@dataclass(frozen=True)
class _Joined:
    """Reads the bytes of two tensors, one behind the other."""

    first: TensorRef
    second: TensorRef

    def __call__(self) -> bytes:
        return bytes(self.first.raw()) + bytes(self.second.raw())
