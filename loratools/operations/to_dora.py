"""A LoRA as a DoRA that makes the same change: magnitudes are the norms of the merged weights.

With m = ‖W + ΔW‖ per output, m/‖W + ΔW‖ ⊙ (W + ΔW) = W + ΔW: exact except for the rounding of m to
float32. It scales an output of norm n by m/n, whose distance from 1 times n is |m − n|: so the
error is ‖m − n‖₂. The factors keep every bit. The base weight is read a block of rows at a time.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loratools.algebra.device import Device
from loratools.base.placement.names import Names
from loratools.base.weights import find_base_module, names_under
from loratools.folding.base_seen import seen_by
from loratools.folding.decomposed import rows_of
from loratools.folding.dora import output_norms
from loratools.folding.without_base import folded_exactly
from loratools.kinds.declaration import Product
from loratools.lowrank.matrices import loaded, matrices
from loratools.operations.in_class_names import renamed_to_class
from loratools.work.parallel import check_workers, done_in_order, usable_cores
from loratools.work.provenance import operation_record, record_metadata
from loratools.work.requests import Progress
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.commands import FUSE_INSTEAD, command_on
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.dtypes import Array
from loratools_formats.core.tensors import in_memory
from loratools_formats.disk.errors import (
    AdapterError,
    UnsupportedError,
    naming,
)
from loratools_formats.disk.provenance import with_record


@dataclass(frozen=True)
class ToDoraModuleReport:
    """One module's magnitudes.

    Attributes:
        name: module path.
        rank: of its factors.
        outputs: number of magnitudes.
        least: the smallest.
        largest: the largest.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ by their rounding to float32; None if ΔW is zero.
    """

    name: str
    rank: int
    outputs: int
    least: float
    largest: float
    relative_error: float | None


@dataclass(frozen=True)
class ToDoraResult:
    """The DoRA, not yet written, and a report per module in path order.

    Attributes:
        adapter: the DoRA.
        modules: the reports.
        relative_error: of all modules together; None if every ΔW is zero.
    """

    adapter: Adapter
    modules: tuple[ToDoraModuleReport, ...]
    relative_error: float | None


class _Lost(NamedTuple):
    """‖ΔW − ΔW'‖ and ‖ΔW‖ of a module or of all."""

    error: float
    size: float

    @property
    def relative(self) -> float | None:
        return self.error / self.size if self.size else None


def to_dora(
    adapter: Adapter,
    base: Checkpoint,
    *,
    workers: int | None = None,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> ToDoraResult:
    """Turn a LoRA into a DoRA that makes the same change.

    Args:
        adapter: plain, or of a kind that folds exactly without the base.
        base: the base model.
        workers: threads over modules, the usable cores by default.
        scratch_folder: where folded factors wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        UnsupportedError: it is a DoRA already, its factors do not tell its change, or a module
            cannot be a DoRA.
        AdapterError: a module does not fit the base, or NaN and infinite values.
    """
    if workers is None:
        workers = usable_cores()
    check_workers(workers)
    adapter.require_true_delta("to-dora")
    adapter = folded_exactly(adapter, "to-dora", scratch_folder, base)
    adapter = renamed_to_class(adapter, base)
    if not adapter.modules:
        raise AdapterError("there is no module to turn into a DoRA", path=adapter.source)
    _refuse_biases(adapter)
    _refuse_stacks(adapter)

    seen = seen_by(adapter, base)
    names, in_base = names_under(adapter, seen.checkpoint, adapter.modules), seen.names

    def one(name: str) -> tuple[ModuleChange, ToDoraModuleReport, _Lost]:
        with naming(adapter.source):
            return _one(name, adapter.modules[name], names, in_base[name])

    done = done_in_order(one, adapter.modules, workers, progress)
    record = operation_record("to-dora", {"adapter": adapter}, {}, base)
    result = replace(
        adapter,
        modules={report.name: delta for delta, report, _ in done},
        metadata=with_record(adapter.metadata, record_metadata(record)),
        provenance=record,
    )
    lost = _Lost(
        *(math.hypot(*sizes) for sizes in zip(*(each for _, _, each in done), strict=True))
    )
    return ToDoraResult(result, tuple(report for _, report, _ in done), lost.relative)


def _refuse_biases(adapter: Adapter) -> None:
    """Refuse what PEFT would not load: a DoRA with a bias in lora_B."""
    biased = [
        n for n, change in adapter.modules.items() if change.require_factors().bias is not None
    ]
    if adapter.format == "peft" and biased:
        raise UnsupportedError(
            "lora_B has a bias, and PEFT has no DoRA with one",
            path=adapter.source,
            tensor=biased[0],
            got=f"{len(biased)} modules with lora_bias",
            hint=FUSE_INSTEAD,
        )


def _refuse_stacks(adapter: Adapter) -> None:
    stacks = [
        name
        for name, change in adapter.modules.items()
        if change.layer.kind == "experts" or change.layer.parameters
    ]
    if not stacks:
        return
    each = command_on(adapter, "convert", "--experts each --base BASE", output="each")
    hint = f"Single experts can, which PEFT loads on transformers 4: {each}"
    if len(stacks) < len(adapter.modules):
        pattern = "|".join(f"^{re.escape(name)}$" for name in stacks)
        without = command_on(adapter, "convert", f"--drop {shlex.quote(pattern)}", output="others")
        hint = f"Take them out first: {without}"
    raise UnsupportedError(
        "stacked experts cannot be a DoRA, since PEFT has none for them",
        path=adapter.source,
        tensor=stacks[0],
        hint=hint,
    )


def _one(
    name: str, whole: ModuleChange, names: Names, in_base: str
) -> tuple[ModuleChange, ToDoraModuleReport, _Lost]:
    if whole.is_dora:
        raise UnsupportedError("it is a DoRA already", tensor=name)
    delta = whole.require_factors()
    place = find_base_module(names, in_base, delta, only_read=True)
    ((b, a),) = loaded(delta)
    change = rows_of(Product(delta.scale * b.astype(np.float64), a.astype(np.float64)))
    norms = output_norms(place.weight(), change)
    if not norms.all():
        raise UnsupportedError(
            "an output has no weight at all, and a DoRA divides by its norm",
            tensor=name,
            got=f"{int(np.count_nonzero(norms == 0.0))} outputs",
        )
    if not np.isfinite(norms).all():
        raise AdapterError("the weight with its change overflows", tensor=name)
    shape: tuple[int, ...] = norms.shape
    if delta.layer.kind == "conv":
        shape = (1, len(norms), *(1 for _ in delta.layer.kernel))
    stored = _stored(norms, name)
    (matrix,) = matrices(delta, Device("cpu"))
    lost = _Lost(math.hypot(*(stored - norms)), math.sqrt(matrix.squared_norm))
    report = ToDoraModuleReport(
        name, delta.rank, len(norms), float(norms.min()), float(norms.max()), lost.relative
    )
    magnitude = in_memory(f"{name}.magnitude", stored.reshape(shape))
    return ModuleChange(delta, magnitude), report, lost


def _stored(norms: Array, name: str) -> Array:
    """Round norms of outputs to float32, (out,).

    Raises:
        AdapterError: one would become infinite or zero.
    """
    with np.errstate(over="ignore", under="ignore"):
        found: Array = norms.astype(np.float32)
    lost = ~np.isfinite(found) | (found == 0.0)
    if lost.any():
        raise AdapterError(
            "magnitudes do not fit float32",
            tensor=name,
            got=f"{int(np.count_nonzero(lost))} of {len(norms)}, such as {norms[lost][0]:.3g}",
            hint="Is this the right base?",
        )
    return found
