"""`fleet_share`, `fleet_add`, `fleet_unshare`: adapters of one base model in shared bases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeVar

from loratools.algebra.ranks import RankRule
from loratools.face.declare import public
from loratools.face.result import AdapterResult, Reported, check_error
from loratools.face.shelf import Shelf, named_adapters
from loratools.face.source import READING, WRITING, Source, beside, destination, label, opened
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.about_outputs import about_output
from loratools.operations.reported import written_nbytes
from loratools.operations.shared import adding, operation, taking
from loratools.operations.shared.adding import AddedModule, AddOptions
from loratools.operations.shared.members import short_names
from loratools.operations.shared.options import RANK_OPTIONS, ShareOptions
from loratools.operations.shared.result import SharedAdapter, SharedModuleReport
from loratools.operations.shared.taking import TakeOptions
from loratools.work.call import running, running_call
from loratools.work.json_object import hidden
from loratools.work.parallel import Workers
from loratools.work.requests import Progress, Reading, Writing
from loratools.work.selection import Dropping
from loratools_formats.contract.files import write_adapter
from loratools_formats.core.adapter import Adapter
from loratools_formats.disk.errors import OptionError
from loratools_formats.disk.publish import publish_folder

R = TypeVar("R", bound=AdapterResult)


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetShareResult(AdapterResult):
    """Adapters in shared bases.

    Attributes:
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all adapters together, of what is stored, rounded.
        alone_error: the least that squeezing each adapter alone to the same size would have.
        bytes_in: size of the adapters' weight files together.
        bytes_out: size of the set's file.
        groups: number of groups with bases of their own.
        adapters: one report each, in the order given.
        modules: one report for each module of each group, in path order.
    """

    operation: ClassVar[str] = "fleet-share"

    relative_error: float
    alone_error: float
    bytes_in: int
    bytes_out: int
    groups: int
    adapters: tuple[SharedAdapter, ...]
    modules: tuple[SharedModuleReport, ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetAddResult(AdapterResult):
    """A set with one adapter more.

    Attributes:
        name: that the new member goes by.
        group: whose bases it has.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ of the new member, of what is stored.
        group_errors: what it would be in each group's bases; None where they lack a module.
        bytes_in: size of the set's file before.
        bytes_out: size of its file now.
        modules: one report each.
    """

    operation: ClassVar[str] = "fleet-add"

    name: str
    group: int
    relative_error: float
    group_errors: tuple[float | None, ...]
    bytes_in: int
    bytes_out: int
    modules: tuple[AddedModule, ...]


@dataclass(frozen=True)
class TakenAdapter:
    """One adapter that was taken out of a set.

    Attributes:
        name: that it goes by in the set.
        rank: the largest of its modules.
        bytes_out: size of its weight file.
        relative_error: of its factors against the ΔW that the set holds.
        shared_error: of the set's ΔW against the adapter that was shared, as the set records it.
    """

    name: str
    rank: int
    bytes_out: int
    relative_error: float
    shared_error: float


@dataclass(frozen=True, kw_only=True, repr=False)
class FleetUnshareResult(Reported):
    """Adapters taken out of a set.

    Attributes:
        made: the adapters by name; their tensors load on demand.
        relative_error: the largest of the adapters' own, which rounding their factors makes.
        adapters: one report each, in the order of the set.
    """

    operation: ClassVar[str] = "fleet-unshare"

    made: dict[str, Adapter] = hidden()
    relative_error: float
    adapters: tuple[TakenAdapter, ...]


@public(
    reading=READING,
    rule=RANK_OPTIONS,
    compute=("dtype", "workers"),
    writing=(*WRITING, "max_error"),
)
def fleet_share(
    adapters: Shelf,
    *,
    options: ShareOptions,
    rule: RankRule,
    compute: ComputeOptions,
    dropping: Dropping,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> FleetShareResult:
    """Store adapters of one base model in shared bases, with a small core for each.

    >>> import loratools as lt
    >>> pair = ["examples/tiny-llama/lora", "examples/tiny-llama/rslora"]
    >>> shared = lt.fleet_share(pair, rank=16, clusters=1)
    >>> shared.groups, [adapter.name for adapter in shared.adapters]
    (1, ['lora', 'rslora'])

    Args:
        adapters: plain, or of kinds that fold into factors exactly; or a mapping from their names.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: no rule for the ranks, different base models, or a budget that is too small.
        InexactError: the error is above `max_error`; the error carries the result.
        AdapterError: modules that differ, an adapter that is zero, or values that are not finite.
        UnsupportedError: a DoRA, or a kind that does not fold exactly.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    hint = "Try `rank=64`, or `budget=25%` of the adapters' size"
    rule.require("the ranks of the bases", hint)
    found = named_adapters(adapters, reading, dropping)
    named = dict(zip(short_names(list(found)), found.values(), strict=True))
    writing = destination(writing, None, named.values())
    done = operation.share(
        named, rule, compute, options, scratch_folder=beside(writing), progress=progress
    )
    result = FleetShareResult.of(done)
    check_error(result, writing.max_error)
    return _written(result, writing)


@public(reading=READING, writing=(*WRITING, "max_error"))
def fleet_add(
    shared: Source,
    source: Source,
    *,
    options: AddOptions,
    dropping: Dropping,
    threads: Workers,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> FleetAddResult:
    """Add an adapter to a shared set, in the set's bases.

    >>> import loratools as lt
    >>> shared = lt.fleet_share({"one": "examples/tiny-llama/lora"}, rank=32)
    >>> added = lt.fleet_add(shared.adapter, "examples/tiny-llama/lora", name="again")
    >>> added.group, added.relative_error < 0.01
    (0, True)

    Args:
        shared: the set.
        source: the adapter to add.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: the name is taken, there is no such group, or another base model.
        InexactError: the error is above `max_error`; the error carries the result.
        AdapterError: no group has all its modules, or they differ.
        UnsupportedError: `shared` is no set, or the adapter is a DoRA or does not fold.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    shelf, adapter = opened(shared, Reading()), opened(source, reading, dropping)
    writing = destination(writing, None, [shelf, adapter])
    done = adding.add(
        shelf,
        adapter,
        options.name or short_names([label(source)])[0],
        options,
        workers=threads.workers,
        scratch_folder=beside(writing),
        progress=progress,
    )
    result = FleetAddResult.of(
        done, bytes_in=shelf.weights_nbytes, bytes_out=written_nbytes(done.adapter)
    )
    check_error(result, writing.max_error)
    return _written(result, writing)


@public(compute=("dtype", "workers"), writing=WRITING)
def fleet_unshare(
    shared: Source,
    *,
    options: TakeOptions,
    compute: ComputeOptions,
    writing: Writing,
    progress: Progress | None = None,
) -> FleetUnshareResult:
    """Take adapters out of a shared set, as plain LoRAs.

    `output` is the PEFT folder of one adapter, or the folder in which each of several gets its own.

    >>> import loratools as lt
    >>> shared = lt.fleet_share({"one": "examples/tiny-llama/lora"}, rank=8)
    >>> taken = lt.fleet_unshare(shared.adapter, name="one")
    >>> taken.adapters[0].rank
    8

    Args:
        shared: the set.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: the set holds no such adapter, or none or all are asked for at once.
        UnsupportedError: it is no set.
        AdapterError: it is not sound, or values do not fit the type.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    shelf = opened(shared, Reading())
    writing = destination(writing, None, [shelf])
    names = taking.chosen(shelf, options)
    if writing.output is None or (len(names) == 1 and not options.everyone):
        done = [_taken(shelf, name, compute, writing, progress) for name in names]
        if writing.output is not None:
            made = done[0].adapter
            write_adapter(made, writing.output, made.format, overwrite=writing.overwrite)
        return _unshared(done)
    found = []
    with publish_folder(writing.output, overwrite=writing.overwrite) as folder:
        for name in names:
            found.append(_taken(shelf, name, compute, writing, progress))
            write_adapter(found[-1].adapter, folder / name, found[-1].adapter.format)
    return _unshared(found)


def _taken(
    shelf: Adapter,
    name: str,
    compute: ComputeOptions,
    writing: Writing,
    progress: Progress | None,
) -> taking.Taken:
    call = running_call()
    if call is not None:  # of this member alone, so that it can be taken again alone
        others = {word: value for word, value in call.options.items() if word != "all"}
        call = replace(call, options={**others, "name": [name]})
    with running(call):
        return taking.take(shelf, name, compute, scratch_folder=beside(writing), progress=progress)


def _unshared(done: Sequence[taking.Taken]) -> FleetUnshareResult:
    told = [about_output(one.adapter) for one in done]
    return FleetUnshareResult(
        findings=tuple(dict.fromkeys(finding for each in told for finding in each)),
        made={one.name: one.adapter for one in done},
        relative_error=max(one.relative_error for one in done),
        adapters=tuple(
            TakenAdapter(
                one.name,
                one.rank,
                written_nbytes(one.adapter),
                one.relative_error,
                one.shared_error,
            )
            for one in done
        ),
    )


def _written(result: R, writing: Writing) -> R:
    """Write a set if an output was given; its name must end as that of a safetensors file."""
    if writing.output is not None and not _is_named_well(writing.output):
        raise OptionError(
            "a shared set is one safetensors file",
            got=str(writing.output),
            hint=f"Name it `output={writing.output}.safetensors`",
        )
    return result.written(writing)


def _is_named_well(output: Path) -> bool:
    return output.name.lower().endswith(".safetensors")
