"""The tensors of two checkpoints of one model, paired, and what becomes of those that differ.

Shards, their order, and prefixes of names may differ between the two. Nothing is held: both are
read a block at a time.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from loratools.base.placement import rules
from loratools.base.placement.class_view import class_view
from loratools.base.placement.names import Names
from loratools.base.placement.orient import stack_is_transposed
from loratools.base.task_class import task_of
from loratools.base.tied import find_tie, shared_embeddings
from loratools.work.module_patterns import pattern_of
from loratools.work.selection import Selection
from loratools_formats.checkpoints import expert_classes
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.checkpoints.facts import (
    DEFAULT_HEAD,
    head_of,
    is_conv1d,
    is_embedding,
)
from loratools_formats.core.adapter import Replacement
from loratools_formats.core.change import KindDelta, Layer, ModuleChange
from loratools_formats.core.dtypes import DTYPES
from loratools_formats.core.findings import Finding
from loratools_formats.core.orientation import named_conv1d
from loratools_formats.core.tensors import Buffer, TensorRef, equal_values, in_file
from loratools_formats.disk.errors import AdapterError, UnsupportedError

_LINEAR = Layer("linear")
_STACKED = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of stacked experts."""
_BUFFER = re.compile(
    r"(?:^|\.)(?:rotary_emb\.(?:original_)?inv_freq|rotary_pos_emb\.inv_freq|position_ids|token_type_ids"
    r"|masked_bias|num_batches_tracked|relative_position_index)$"
)
"""Buffers that older releases stored, which a class computes itself."""
_PROJECTION = "text_projection"
"""OpenCLIP's parameter, (in, out); elsewhere it is a module."""
_PARALLEL = re.compile(r"(?:.*\.)?(?:input_linear|output_linear)")
"""Modules whose weight is a stack of experts, too, under names that PEFT does not know."""
_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)")
Side = Literal["base", "tuned"]


@dataclass(frozen=True)
class Pair:
    """One tensor of both checkpoints.

    Attributes:
        key: its name in the base.
        old: before.
        new: after.
        use: what becomes of it if it changed: a `layer` to adapt, a tensor to carry `whole`, or
            `none` if a LoRA has no place for it.
        layer: what the module is.
        transposed: whether it is stored as (in, out).
        hint: what to do if a LoRA has no place for it.
    """

    key: str
    old: TensorRef
    new: TensorRef
    use: Literal["layer", "whole", "none"]
    layer: Layer = _LINEAR
    transposed: bool = False
    hint: str = "Leave all of its module out with `exclude`"

    @property
    def module(self) -> str:
        """Path of the module it belongs to."""
        parent, _, leaf = self.key.rpartition(".")
        own = {"in_proj_weight": f"{parent}.in_proj", _PROJECTION: self.key}
        return own.get(leaf, parent)

    def differs(self) -> bool:
        """Return whether any value changed, reading both a block at a time."""
        return not equal_values(self.old, self.new)

    def replacement(self) -> Replacement:
        """Return the new tensor as one that replaces the old."""
        leaf = self.key.rpartition(".")[2]
        if is_embedding(self.module):
            return Replacement("embedding", self.key, self.new)
        return Replacement("bias" if leaf == "bias" else "other", self.key, self.new)

    def delta(self) -> ModuleChange:
        """Return the difference, computed when it is read."""
        source = _DifferenceSource(self.old, self.new)
        diff = in_file(self.key, DTYPES["F64"], self.new.shape, source, 0)
        settings = {"scale": 1.0, "transposed": self.transposed}
        return ModuleChange(KindDelta("full", {"diff": diff}, settings, self.layer))


@dataclass(frozen=True)
class _DifferenceSource:
    """new − old in float64, as a place to read elements from."""

    old: TensorRef
    new: TensorRef

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return the bytes of elements of the difference."""
        start, stop = offset // 8, (offset + nbytes) // 8
        values = self.new.elements(start, stop).astype(np.float64)
        values -= self.old.elements(start, stop)
        return memoryview(values.view(np.uint8).data)


class Comparison:
    """Both checkpoints, and what each of their tensors is."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, selection: Selection) -> None:
        before, after = class_view(base), class_view(tuned, base.config)
        self.base, self.tuned = before.checkpoint, after.checkpoint
        self._selection = selection
        self._other_form = {name for name in before.kept if before.known}
        self._names = Names(self.base)
        self.findings: list[Finding] = []
        self.heads: dict[str, Replacement] = {}
        self.task = task_of(self.tuned.config)
        self._tie = find_tie(self._names, guess_head=True)
        self._shared = shared_embeddings(self._names)

    def pairs(self) -> list[Pair]:
        """Return every tensor of both, and keep in `heads` what makes a classifier of the base.

        Raises:
            AdapterError: one is in only one of them, or of another shape.
            UnsupportedError: the base ties what the tuned checkpoint has apart.
        """
        names = Names(self.tuned)
        both = {key: other for key in self.base.tensors if (other := names.find(key)) is not None}
        adds_head = self.task is not None and all(key == other for key, other in both.items())
        alone = [
            *self._alone(self.base, set(both), "tuned", adds_head=adds_head),
            *self._alone(self.tuned, set(both.values()), "base", adds_head=adds_head),
        ]
        if alone:
            raise self._one_sided(alone, {key.rpartition(".")[0] for key in both})
        pairs = [
            self._pair(key, self.base.tensors[key], self.tuned.tensors[other])
            for key, other in both.items()
        ]
        return self._without_tied_head(pairs)

    def _without_tied_head(self, pairs: list[Pair]) -> list[Pair]:
        """Leave out an output layer that both checkpoints store as a copy of the embedding.

        Raises:
            UnsupportedError: the base's configuration ties the two, and one of the checkpoints
                stores different ones.
        """
        by_key = {pair.key: pair for pair in pairs}
        tie = self._tie
        if tie is None or tie.embedding not in by_key or tie.head not in by_key:
            return pairs
        embedding, head = by_key[tie.embedding], by_key[tie.head]
        if not (embedding.differs() or head.differs()):
            return pairs
        for old_or_new in ((embedding.old, head.old), (embedding.new, head.new)):
            if not equal_values(*old_or_new):
                raise UnsupportedError(
                    "the base's config ties the embedding and the output layer, yet a checkpoint "
                    "stores two different ones",
                    path=self.base.path,
                    tensor=tie.head,
                    hint="Set tie_word_embeddings to false in the base's config.json",
                )
        return [pair for pair in pairs if pair is not head]

    def _alone(
        self, here: Checkpoint, paired: set[str], other: Side, *, adds_head: bool
    ) -> list[str]:
        """Return the tensors that only one checkpoint has and that may play a part.

        Args:
            here: which has them.
            paired: those that both have.
            other: the one that lacks them.
            adds_head: whether the tuned model is a classifier, and all names are those of the base.
        """
        alone = []
        for key in here.tensors:
            if key in paired:
                continue
            module = key.rpartition(".")[0]
            is_outer = adds_head and not _NUMBER.search(key)
            if self._is_tied_copy(key, here):
                message = f"{key} is tied in the {other} checkpoint and not compared"
                self.findings.append(Finding("tied-skipped", "note", key, message))
            elif _BUFFER.search(key):
                message = f"{key} is a buffer that the {other} checkpoint lacks; left out"
                self.findings.append(Finding("buffer-skipped", "note", key, message))
            elif module not in self._selection:
                message = f"{key}, which the {other} checkpoint lacks, is left out as asked"
                self.findings.append(Finding("one-sided-skipped", "note", key, message))
            elif is_outer and other == "base":
                self.heads[key] = Replacement("module", key, here.tensors[key])
                message = f"{key}, which the base lacks, is carried whole: it belongs to the task"
                self.findings.append(Finding("head-carried", "note", key, message))
            elif is_outer:
                message = f"{key} is left out: the tuned model, a classifier, does without it"
                self.findings.append(Finding("one-sided-skipped", "note", key, message))
            else:
                alone.append(key)
        return alone

    def _one_sided(self, keys: list[str], shared: set[str]) -> AdapterError | UnsupportedError:
        """Return the error of tensors that only one checkpoint has.

        Args:
            keys: their names.
            shared: modules that both have.
        """
        key = keys[0]
        here, there = (self.base, self.tuned)[:: 1 if key in self.base.tensors else -1]
        leave_out = "leave it out with `exclude`: " + self.pattern(
            (key.rpartition(".")[0] for key in keys), shared
        )
        if here is self.tuned and self._is_head(key.rpartition(".")[0]):
            return UnsupportedError(
                "the tuned checkpoint has an output layer of its own, the base's is tied to its "
                "embedding",
                path=here.path,
                tensor=key,
                hint="Untie the base first: store the embedding under this name too, and set "
                f"tie_word_embeddings to false in its config.json; or {leave_out}",
            )
        return AdapterError(
            "a tensor is in only one of the checkpoints",
            path=here.path,
            tensor=key,
            got=f"{len(keys)} such tensors" if len(keys) > 1 else None,
            expected=f"the same tensor in {there.path.name}",
            hint=leave_out[0].upper() + leave_out[1:],
        )

    def pattern(self, modules: Iterable[str], shared: Iterable[str]) -> str:
        """Return what `exclude` takes to leave out modules, besides what it leaves out already.

        Args:
            modules: their paths.
            shared: those that must stay.
        """
        return self.besides_given(pattern_of(modules, shared))

    def besides_given(self, found: str) -> str:
        """Return a pattern for `exclude` that leaves out what it does already, too."""
        given = self._selection.exclude
        return shlex.quote(found if given is None else f"{given}|{found}")

    def _is_tied_copy(self, key: str, checkpoint: Checkpoint) -> bool:
        """Return whether a tensor is an output embedding that repeats the input embedding."""
        ref = checkpoint.tensors[key]
        if not self._is_head(key.rpartition(".")[0]):
            return False
        return any(
            is_embedding(other.rpartition(".")[0])
            and tensor.shape == ref.shape
            and equal_values(tensor, ref)
            for other, tensor in checkpoint.tensors.items()
            if len(tensor.shape) == 2
        )

    def _pair(self, key: str, old: TensorRef, new: TensorRef) -> Pair:
        module, _, leaf = key.rpartition(".")
        dims = len(old.shape)
        is_task = self.task is not None and not rules.TASK_HEADS.isdisjoint(module.split("."))
        resizable = dims == 2 and (is_embedding(module) or self._is_head(module))
        if old.shape != new.shape and not (
            (resizable or is_task) and old.shape[1:] == new.shape[1:]
        ):
            raise AdapterError(
                "a tensor has another shape in the tuned checkpoint",
                path=self.tuned.path,
                tensor=key,
                got=list(new.shape),
                expected=list(old.shape),
            )
        if not (old.dtype.floating and new.dtype.floating):
            return Pair(key, old, new, "none")
        if key in self._other_form:
            hint = "The class keeps it in another form; leave its module out with `exclude`"
            return Pair(key, old, new, "none", hint=hint)
        if dims <= 1 or old.shape != new.shape or self._is_shared(key):
            return Pair(key, old, new, "whole")
        stack = self._of_experts(key, old, new)
        if stack is not None:
            return stack
        if leaf == "in_proj_weight" and dims == 2 and "architectures" not in self.base.config:
            return Pair(key, old, new, "layer", Layer("linear"))
        if leaf == _PROJECTION and dims == 2 and "architectures" not in self.base.config:
            return Pair(key, old, new, "layer", Layer("linear"), transposed=True)
        if leaf != "weight" or dims > 5:
            return Pair(key, old, new, "none")
        if dims > 2:
            return Pair(key, old, new, "layer", Layer("conv", kernel=old.shape[2:]))
        return self._matrix(key, old, new)

    def _matrix(self, key: str, old: TensorRef, new: TensorRef) -> Pair:
        module = key.rpartition(".")[0]
        odd = self._names.odd_kind(module)
        if odd == "embedding" or (odd is None and is_embedding(module)):
            return Pair(key, old, new, "layer", Layer("embedding"), transposed=True)
        if self._names.is_bare(key):
            return Pair(key, old, new, "layer", Layer("linear", parameters=(key,)))
        transposed = is_conv1d(key, self.base.config) if odd is None else odd == "conv1d"
        if not transposed and "model_type" not in self.base.config:
            self._refuse_unknown_layout(key, module)
        layer = Layer("linear", transposed_if_square=transposed)
        return Pair(key, old, new, "layer", layer, transposed)

    def _is_head(self, module: str) -> bool:
        head = head_of(sorted(self._names.types))
        return f".{module}".endswith((f".{head}", f".{DEFAULT_HEAD}"))

    def _is_shared(self, key: str) -> bool:
        """Return whether several layers use a weight: a LoRA would change only one of them."""
        tie = self._tie
        if tie is not None and key in (tie.embedding, tie.head):
            return True
        return self._names.spelling(key).removesuffix(".weight") in self._shared

    def _of_experts(self, key: str, old: TensorRef, new: TensorRef) -> Pair | None:
        """Return a pair of stacked experts; None if it is none."""
        module, _, leaf = key.rpartition(".")
        if len(old.shape) == 3 and leaf in _STACKED and module.endswith("experts"):
            return self._stack(key, old, new)
        if len(old.shape) != 3 or leaf != "weight" or not _PARALLEL.fullmatch(module):
            return None
        if "jetmoe" not in self._names.types_of(key):  # whose modules are one stack each
            return Pair(key, old, new, "none")
        layer = Layer("experts", (), (key,), swapped=False)
        return Pair(key, old, new, "layer", layer)

    def _stack(self, key: str, old: TensorRef, new: TensorRef) -> Pair:
        """Return a pair of stacked experts; how their matrices lie depends on the model type."""
        types = set(self._names.types_of(key))
        transposed = bool(types & rules.TRANSPOSED_EXPERTS)
        straight = rules.STRAIGHT_EXPERTS
        if self._names.has_class:  # whatever way the checkpoint stored them
            straight |= expert_classes.STRAIGHT
        if not transposed and not types & straight:
            hint = "The model type does not tell how experts lie; leave them out with `exclude`"
            return Pair(key, old, new, "none", hint=hint)
        lies = stack_is_transposed(self._names, key)
        swapped = None if lies is None else lies != transposed
        layer = Layer("experts", (), (key,), transposed_if_square=transposed, swapped=swapped)
        return Pair(key, old, new, "layer", layer, transposed)

    def _refuse_unknown_layout(self, key: str, module: str) -> None:
        if named_conv1d(module):
            raise UnsupportedError(
                "the checkpoint does not show whether the weight is stored as (in, out)",
                path=self.base.path,
                tensor=key,
                hint="Give the folder with the base's config.json",
            )
