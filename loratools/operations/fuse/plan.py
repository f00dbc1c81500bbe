"""What fusing will do, tensor by tensor, before a weight is read: changes, shapes, types, ties."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loratools.base.placement import BiasPlacement, Placement, Placements, place
from loratools.base.placement.place import UnmatchedError
from loratools.base.weights import BaseModule
from loratools.folding.base_seen import divided_in
from loratools.folding.without_base import folded_where_exact, needs_base, to_lora_command
from loratools.naming.for_base import named_for_base
from loratools.operations.fuse.blocks import Patch
from loratools.operations.fuse.classifier import classifier_of, is_own_head
from loratools.operations.fuse.draft import Draft, FuseInput, replace_values, with_replaced_rows
from loratools.operations.fuse.streamed import (
    StreamedPlacement,
    is_streamed,
    refuse_clashes,
    streamed_placements,
)
from loratools.operations.fuse.terms import WeightedChange
from loratools.operations.in_class_names import in_class_names
from loratools_formats.checkpoints import expert_classes
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.eight_bit_floats import FP8_TYPES
from loratools_formats.checkpoints.facts import (
    is_vocabulary,
    model_types,
    text_values,
    with_text_values,
)
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.dtypes import DTYPES, FLOATING, Array, DType
from loratools_formats.core.findings import Finding
from loratools_formats.core.tensors import TensorRef
from loratools_formats.disk.errors import AdapterError, LoratoolsError, UnsupportedError

ADDABLE = (*FLOATING, *FP8_TYPES)
_SINGLE = re.compile(r"\.experts\.(?:\d+\.|gate_up_projs\.)")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        key: its name.
        source: the values it begins with, under that name: the base's, or an adapter's.
        dtype: type it is stored in.
        changes: what is added.
        patches: rows that are replaced first.
        original: the base's tensor of that name, None for a new one.
        replaced_by: name of the adapter whose tensor it is, None if it is the base's.
    """

    key: str
    source: TensorRef
    dtype: DType
    changes: tuple[WeightedChange, ...] = ()
    patches: tuple[Patch, ...] = ()
    original: TensorRef | None = None
    replaced_by: str | None = None

    @property
    def is_touched(self) -> bool:
        """Whether an adapter changes it."""
        return bool(self.changes or self.patches or self.replaced_by)

    @property
    def replaces(self) -> bool:
        """Whether values of the base are replaced, which are then compared with the new ones."""
        return bool(self.patches or self.replaced_by) and self.source.dtype.code in FLOATING

    @property
    def is_widened(self) -> bool:
        """Whether it was a plain eight-bit float, to which nothing can be added in its type."""
        return bool(self.changes or self.patches) and self.source.dtype.code in FP8_TYPES

    @property
    def is_copy(self) -> bool:
        """Whether the bytes of its source are stored unchanged."""
        return not self.changes and not self.replaces and self.dtype == self.source.dtype

    def old_values(self, start: int, values: Array) -> Array:
        """Return the base's values of a block: those it begins with, or those they replace.

        Args:
            start: index of the block's first element.
            values: (n,) what the block begins with.
        """
        if not self.replaces:
            return values
        old = np.zeros(values.shape)
        if self.original is not None and start < self.original.numel:
            stop = min(start + len(values), self.original.numel)
            old[: stop - start] = self.original.elements(start, stop)
        return old

    @property
    def modules(self) -> tuple[str, ...]:
        """The adapters' modules that change it."""
        return tuple(dict.fromkeys(change.placement.module for change in self.changes))


@dataclass(frozen=True)
class FusePlan:
    """Everything that fusing will do.

    Attributes:
        base: the checkpoint, as plain tensors.
        tensors: every tensor of the output, new ones after the one they derive from.
        config: the new configuration, None if it stays.
        findings: what a user should know.
    """

    base: Checkpoint
    tensors: Mapping[str, TensorPlan]
    config: Mapping[str, Any] | None
    findings: tuple[Finding, ...]

    @property
    def touched(self) -> tuple[TensorPlan, ...]:
        """The tensors that adapters change."""
        return tuple(plan for plan in self.tensors.values() if plan.is_touched)


def plan_fuse(
    base: Checkpoint,
    inputs: Sequence[FuseInput],
    dtype: str | None = None,
    stored: Mapping[str, DType] | None = None,
) -> FusePlan:
    """Return what fusing adapters into a base will do.

    Args:
        base: a checkpoint of plain tensors.
        inputs: the adapters with their weights.
        dtype: safetensors code of the type of all floating tensors; each keeps its own by default.
        stored: type to keep for some tensors instead of their own.

    Raises:
        AdapterError: a module fits no tensor, adapters contradict each other, or shapes differ.
        UnsupportedError: an adapter's ΔW is not known, or the base's type cannot be added to.
    """
    findings: list[Finding] = []
    placed = []
    found = [_in_names_of(item.adapter, base) for item in inputs]
    inputs = [replace(i, adapter=adapter) for i, (adapter, _) in zip(inputs, found, strict=True)]
    streamed: list[list[Placement | BiasPlacement | StreamedPlacement]] = []
    for index, (given, (_, divided)) in enumerate(zip(inputs, found, strict=True)):
        item, placements = _placed(given, base, divided)
        inputs[index] = item
        weights, biases = streamed_placements(item.adapter, base, divided)
        refuse_clashes(base, placements, weights)
        placed.append(placements)
        streamed.append([*weights, *biases])
        findings += [each for each in placements.findings if each not in findings]
        _refuse_weighted_replacement(item, placements)
        if item.weight < 0 and any(map(needs_base, item.adapter.modules.values())):
            message = (
                f"{item.name}: its change depends on the weights; a negative weight subtracts "
                "that of these weights, and cannot take out one that is fused already"
            )
            findings.append(Finding("negative-weight", "warning", item.name, message))
    untied = _untied(inputs, placed)
    drafts = {key: Draft(tensor) for key, tensor in base.tensors.items()}
    for new, origin in untied.items():
        drafts[new] = Draft(base.tensors[origin].renamed(new))
    for item, placements, others in zip(inputs, placed, streamed, strict=True):
        for key, replacement in placements.replacements:
            replace_values(drafts, key, replacement, item)
        for placement in (*placements.deltas, *placements.biases, *others):
            drafts[placement.key].changes.append(WeightedChange(placement, item.weight))
    plans = {
        key: _tensor_plan(base, key, drafts[key], dtype, (stored or {}).get(key))
        for key in _ordered(base, untied, drafts)
    }
    widened = sum(plan.is_widened for plan in plans.values())
    if widened and dtype is None:
        message = f"weights in eight bits that change are stored as BF16: {widened}"
        findings.append(Finding("widened", "note", None, message))
    adapters = [item.adapter for item in inputs]
    bodies = {key: plan for key, plan in plans.items() if not is_own_head(key, adapters)}
    resized = _resized(base, bodies)
    config = _config(base, untied=bool(untied), resized=resized, dtype=dtype)
    classifier = classifier_of(adapters, base, plans)
    if classifier is not None:
        config = {**(config or base.config), **classifier.config}
        findings.append(classifier.finding)
    if resized is not None:
        message = f"the vocabulary has {resized[1]} entries now, {resized[0]} before"
        findings.append(Finding("vocabulary-resized", "note", None, message))
    return FusePlan(base, plans, config, tuple(findings))


def ready(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Return an adapter with everything as factors that folds exactly, for a base of any store.

    Raises:
        UnsupportedError: it has no true ΔW, or a setting is neither in the file nor in the base.
    """
    adapter.require_true_delta("fuse")
    return with_replaced_rows(folded_where_exact(adapter, "fuse", None, base=base, dense=False))


def _placed(
    item: FuseInput, base: Checkpoint, divided: Mapping[str, BaseModule]
) -> tuple[FuseInput, Placements]:
    """Return where an adapter's changes go, under the names of the base's class if need be.

    A file may leave out which part of a model a layer is in, as Tinker's do.
    """
    try:
        return item, place(_without_streamed(item.adapter, divided), base)
    except UnmatchedError as error:
        try:
            renamed = in_class_names([item.adapter], base)[0]
        except LoratoolsError:
            raise error from None
        return replace(item, adapter=renamed), place(_without_streamed(renamed, divided), base)


def _in_names_of(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, dict[str, BaseModule]]:
    """Return an adapter whose names lead to a checkpoint's tensors.

    Returns:
        It, and where the base has modules that keep their names: it cuts them or puts them together
        with others, and they are no plain LoRAs, which are cut and put together themselves.
    """
    given = ready(adapter, base)
    divided = divided_in(given, base)
    rest = {name: change for name, change in given.modules.items() if name not in divided}
    try:
        named = named_for_base(replace(given, modules=rest), base)
    except UnsupportedError as error:
        change = given.modules.get(error.tensor or "")
        if change is not None:
            error.hint = f"Make it a plain LoRA first: {to_lora_command(adapter, change)}"
        raise
    kept = {name: given.modules[name] for name in divided}
    named = replace(named, modules={**named.modules, **kept})
    if adapter.format == "mlx" or _alternates(named, base):
        return in_class_names([named], base)[0], divided
    return named, divided


def _alternates(adapter: Adapter, base: Checkpoint) -> bool:
    """Return whether single experts go to every other output of a stack, one row at a time.

    Put together first, they are one product.
    """
    if not model_types(base.config) & expert_classes.ALTERNATING:
        return False
    return any(_SINGLE.search(module) for module in adapter.modules)


def _without_streamed(adapter: Adapter, divided: Collection[str]) -> Adapter:
    modules = {
        name: delta
        for name, delta in adapter.modules.items()
        if name not in divided and not is_streamed(delta)
    }
    return replace(adapter, modules=modules)


def _tensor_plan(
    base: Checkpoint, key: str, draft: Draft, dtype: str | None, stored: DType | None
) -> TensorPlan:
    code = draft.source.dtype.code
    is_float = code in ADDABLE
    changed = bool(draft.changes or draft.patches)
    if changed and not is_float:
        raise UnsupportedError(
            "nothing can be added to a tensor of this type",
            path=base.path,
            tensor=key,
            got=code,
            expected=", ".join(FLOATING),
        )
    kept = stored or _own(base, key, draft)
    if changed and code in FP8_TYPES:
        kept = DTYPES["BF16"]
    return TensorPlan(
        key,
        draft.source.renamed(key),
        DTYPES[dtype] if dtype is not None and is_float else kept,
        tuple(draft.changes),
        tuple(draft.patches),
        base.tensors.get(key),
        None if draft.replaced_by is None else draft.replaced_by.name,
    )


def _own(base: Checkpoint, key: str, draft: Draft) -> DType:
    """Return the type in which a tensor is stored by default: the base's."""
    if key in base.tensors and draft.source.dtype.code in FLOATING:
        return base.tensors[key].dtype
    return draft.source.dtype


def _refuse_weighted_replacement(item: FuseInput, placements: Placements) -> None:
    if placements.replacements and item.weight != 1.0:
        _, replacement = placements.replacements[0]
        raise UnsupportedError(
            f"{item.name} replaces base tensors, which cannot be weighted or taken out again",
            tensor=replacement.tensor.key,
            got=f"weight {item.weight:g}",
            expected="weight 1",
        )


def _untied(inputs: Sequence[FuseInput], placed: Sequence[Placements]) -> dict[str, str]:
    """Return the tensors to be untied, by name, with the stored ones they copy.

    Raises:
        UnsupportedError: one adapter unties a weight that another changes as tied.
    """
    untied = {new: origin for placements in placed for new, origin in placements.untied.items()}
    for new, origin in untied.items():
        for item, placements in zip(inputs, placed, strict=True):
            touches = [p.key for p in placements.deltas] + [k for k, _ in placements.replacements]
            if origin in touches and new not in placements.untied:
                raise UnsupportedError(
                    f"{item.name} changes tied weights alike, another adapter changes one of them",
                    tensor=origin,
                    hint="Fuse them one after the other",
                )
    return untied


def _ordered(base: Checkpoint, untied: Mapping[str, str], drafts: Mapping[str, Draft]) -> list[str]:
    """Return all names, each new one after the tensor it begins as a copy of."""
    order = []
    for key in base.tensors:
        order.append(key)
        order += [new for new, origin in untied.items() if origin == key]
    return order + [key for key in drafts if key not in base.tensors and key not in untied]


def _resized(base: Checkpoint, plans: Mapping[str, TensorPlan]) -> tuple[int, int] | None:
    """Return the old and the new size of the vocabulary if it changes.

    Raises:
        AdapterError: a replacement has another shape otherwise.
    """
    found: tuple[int, int] | None = None
    for key, plan in plans.items():
        old = base.tensors[key].shape if key in base.tensors else plan.source.shape
        new = plan.source.shape
        if new == old:
            continue
        along_vocabulary = (
            old[:1] == (text_values(base.config).get("vocab_size"),)
            and old[1:] == new[1:]
            and found in (None, (old[0], new[0]))
        )
        if not along_vocabulary:
            raise AdapterError(
                "replacement has another shape than the base tensor",
                path=base.path,
                tensor=key,
                got=list(new),
                expected=list(old),
            )
        found = old[0], new[0]
    if found is not None:
        left = [
            key
            for key, plan in plans.items()
            if plan.source.shape[:1] == (found[0],) and is_vocabulary(key.removesuffix(".weight"))
        ]
        if left:
            raise AdapterError(
                "the vocabulary is resized, but not this tensor", path=base.path, tensor=left[0]
            )
    return found


def _config(
    base: Checkpoint, *, untied: bool, resized: tuple[int, int] | None, dtype: str | None
) -> dict[str, Any] | None:
    changes: dict[str, Any] = {}
    if untied:
        changes["tie_word_embeddings"] = False
    if resized is not None:
        changes["vocab_size"] = resized[1]
    if dtype is not None:
        name = DTYPES[dtype].torch
        changes |= {key: name for key in ("torch_dtype", "dtype") if key in base.config}
    if not changes or not base.config:
        return None
    return with_text_values(base.config, changes)
