"""`unshare`: adapters of a set as plain LoRAs again.

A member's ΔW is U Σ Vᵀ. Its factors are the singular triplets of that product, in canonical form,
of the rank of the bases and rounded once to the type asked for. What the rounding adds is stated;
what sharing had lost stays lost, and the set says how much that was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.algebra.device import Device
from loratools.algebra.one_matrix import Matrix
from loratools.lowrank.planned import PlannedFactors
from loratools.lowrank.resize import ComputeOptions, Resizer
from loratools.operations.reported import ratio
from loratools.operations.shared.bases import cores_of, finite
from loratools.work.declared import option
from loratools.work.parallel import done_in_order
from loratools.work.provenance import operation_record, record_metadata
from loratools.work.requests import Progress
from loratools.work.scratch import Scratch
from loratools.work.typed import check_options
from loratools_formats.contract.shared_set import Member, Part, SharedModule, SharedSet
from loratools_formats.contract.shared_set_read import parsed
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import OptionError, and_more
from loratools_formats.disk.provenance import with_record


@dataclass(frozen=True)
class TakeOptions:
    """Which adapters of a set to take.

    Attributes:
        names: the adapter of this name.
        everyone: every adapter, each into a folder of its name.
    """

    names: tuple[str, ...] = option((), heading="Input", name="name")
    everyone: bool = option(False, heading="Input", name="all")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Taken:
    """One adapter of a set, not yet written.

    Attributes:
        name: that it went by in the set.
        adapter: plain, in PEFT's terms.
        rank: the largest of its modules.
        relative_error: of the written factors against the set's ΔW.
        shared_error: of the set's ΔW against the adapter that was shared.
    """

    name: str
    adapter: Adapter
    rank: int
    relative_error: float
    shared_error: float


def chosen(shelf: Adapter, options: TakeOptions) -> list[str]:
    """Return the members that are asked for, in the order of the set.

    Raises:
        OptionError: none or both are asked for, or the set has no such member.
        UnsupportedError: it is no set.
    """
    members = [member.name for member in parsed(shelf).members]
    names, everyone = options.names, options.everyone
    if everyone == bool(names):
        raise OptionError(
            "the adapters to take are named twice"
            if everyone
            else "no adapter of the set is named",
            expected="names, or `all=True`",
            hint=f"It holds {and_more(members, 8)}",
        )
    for name in names:
        if name not in members:
            raise OptionError(
                "the set holds no such adapter", got=name, hint=f"It holds {and_more(members, 8)}"
            )
    return [name for name in members if everyone or name in names]


def take(
    shelf: Adapter,
    name: str,
    compute: ComputeOptions,
    *,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> Taken:
    """Return one adapter of a set as a plain LoRA.

    Args:
        shelf: the set's file, as read.
        name: of the member.
        compute: threads, and the type to store; by default the set's own.
        scratch_folder: where factors wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: the set has no such member.
        UnsupportedError: it is no set.
        AdapterError: it is not sound, or values do not fit the type.
    """
    shared = parsed(shelf)
    place = [member.name for member in shared.members].index(name)
    member = shared.members[place]
    resizer = Resizer(compute, Scratch(scratch_folder), one_scale=False)
    owned = [
        (module, module.parts[member.group])
        for module in shared.modules.values()
        if member.group in module.parts and place in module.parts[member.group].members
    ]

    def one(entry: tuple[SharedModule, Part]) -> tuple[ModuleChange, float, float]:
        return _change(*entry, place, member, shared, resizer)

    done = done_in_order(one, owned, compute.threads, progress)
    changes = {entry[0].name: change for entry, (change, _, _) in zip(owned, done, strict=True)}
    lost, whole = sum(error for _, error, _ in done), sum(norm for _, _, norm in done)
    record = _record(shelf, name, compute)
    adapter = Adapter(
        format="peft",
        source=None,
        modules=changes,
        replacements=member.replacements,
        carried=member.carried,
        config=member.config,
        metadata=with_record({}, record_metadata(record)),
        base_model=_base_model(member.config, shared),
        inputs=shelf.inputs,
        provenance=record,
    )
    ranks = [change.rank or 0 for change in changes.values()]
    error = ratio(lost, whole)
    return Taken(name, adapter, max(ranks, default=0), error, member.relative_error)


def _record(shelf: Adapter, name: str, compute: ComputeOptions) -> dict[str, Any]:
    values: dict[str, Any] = {"name": name}
    if compute.dtype is not None:
        values["dtype"] = compute.dtype
    return operation_record("fleet-unshare", {"shared": shelf}, values)


def _change(
    module: SharedModule,
    part: Part,
    place: int,
    member: Member,
    shared: SharedSet,
    resizer: Resizer,
) -> tuple[ModuleChange, float, float]:
    """Return a module's change, the squared error of its rounding, and its squared norm.

    Raises:
        AdapterError: a basis or a core holds NaN or infinite values.
    """
    u, v = finite(part.u), finite(part.v)
    cores = cores_of(part.core(place), part.experts, diagonal=shared.diagonal)
    triples = zip(u.reshape(-1, *u.shape[-2:]), cores, v.reshape(-1, *v.shape[-2:]), strict=True)
    matrices = [_matrix(*each) for each in triples]
    planned = PlannedFactors.new(
        module.name,
        module.layer,
        part.shape,
        experts=part.experts,
        bias=member.biases.get(module.name),
    )
    planned = planned.resized(1, part.v.dtype, part.u.dtype, 1.0)
    rank = min(u.shape[-1], v.shape[-2], *part.shape)
    done = resizer.compressed(module.name, planned, matrices, rank)
    norm = sum(matrix.squared_norm for matrix in matrices)
    return ModuleChange(done.delta), done.squared_error, norm


def _matrix(u: Array, core: Array, v: Array) -> Matrix:
    """Return U Σ Vᵀ with the narrower basis as the inner side."""
    pair = (u @ core, v) if len(v) <= u.shape[1] else (u, core @ v)
    return Matrix(*pair, 1.0, Device("cpu"), use_gram=False)


def _base_model(config: Mapping[str, Any], shared: SharedSet) -> str | None:
    named = config.get("base_model_name_or_path")
    return named if isinstance(named, str) else shared.base_model
