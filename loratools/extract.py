"""The LoRA between two checkpoints: what a full or sparse fine-tune changed, at a chosen rank.

Every tensor of the two is compared. Linear layers, convolutions and embeddings that changed become
differences of full rank, which `fold` approximates, streamed from both files; norms, biases and
embeddings that are tied or were resized are carried whole, as replacements; anything else that
changed is refused. Tensors that did not change are left out.

Shards, their order, and prefixes of names may differ between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from loratools.fold.operation import FoldChoices, FoldResult, fold_choices, to_lora
from loratools.linears import is_conv1d, is_embedding
from loratools.parallel import in_order
from loratools.placement.names import Names
from loratools.placement.rules import CONV1D_LEAVES
from loratools.plain import plain
from loratools.provenance import operation_record, record_metadata
from loratools.ranks import RankRule, as_options
from loratools.resize import ComputeOptions
from loratools.selection import Selection
from loratools_formats.adapter import Adapter, Delta, Layer, OtherDelta, Replacement
from loratools_formats.checkpoint import Checkpoint
from loratools_formats.dtypes import DTYPES
from loratools_formats.errors import AdapterError, UnsupportedError
from loratools_formats.peft.keys import replaced_name
from loratools_formats.tensors import Buffer, TensorRef, in_file

Array = np.ndarray[Any, Any]

_WEIGHT = ".weight"
_BLOCK_BYTES = 1 << 22
_LINEAR = Layer("linear")


@dataclass(frozen=True)
class Difference:
    """What changed between two checkpoints, not yet of low rank.

    Attributes:
        adapter: full differences by module, and replacements.
        unchanged: number of tensors that are the same.
        skipped: tensors that changed and were not selected.
        notes: what the user should know.
    """

    adapter: Adapter
    unchanged: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def difference(
    base: Checkpoint,
    tuned: Checkpoint,
    selection: Selection | None = None,
    *,
    base_name: str | None = None,
    workers: int = 2,
) -> Difference:
    """Compare two checkpoints.

    Args:
        base: before.
        tuned: after.
        selection: modules to take; others that changed are left out and listed.
        base_name: what to record as the base model; by default what its configuration says.
        workers: threads over tensors.

    Raises:
        AdapterError: a tensor is in only one of the two, or of another shape, or nothing changed.
        UnsupportedError: a tensor changed that has no place in a LoRA.
    """
    selection = selection or Selection()
    comparison = _Comparison(plain(base).checkpoint, plain(tuned).checkpoint)
    skipped: list[str] = []
    modules: dict[str, Delta] = {}
    replacements: dict[str, Replacement] = {}
    pairs = comparison.pairs()
    changed = in_order(lambda pair: pair.differs(), pairs, workers)
    unchanged = 0
    for pair, differs in zip(pairs, changed, strict=True):
        if not differs:
            unchanged += 1
        elif pair.module not in selection:
            skipped.append(pair.key)
        elif pair.use == "layer":
            modules[pair.module] = pair.delta()
        elif pair.use == "whole":
            replacements[pair.key] = pair.replacement()
        else:
            raise UnsupportedError(
                "a tensor changed that has no place in a LoRA",
                path=tuned.path,
                tensor=pair.key,
                got=f"{pair.new.dtype.code} {list(pair.new.shape)}",
                hint="Leave its module out with --exclude",
            )
    if not modules and not replacements:
        raise AdapterError(
            "nothing to extract",
            path=tuned.path,
            got=f"{unchanged} tensors that did not change, {len(skipped)} not selected",
        )
    if not modules:
        raise AdapterError(
            "no weight changed that a LoRA could change",
            path=tuned.path,
            got=f"{len(replacements)} changed norms, biases or embeddings",
            hint="A LoRA needs a module to adapt",
        )
    adapter = Adapter(
        format="peft",
        source=None,
        modules=modules,
        replacements={
            replaced_name(key, modules): replacement for key, replacement in replacements.items()
        },
        config=comparison.config(modules, base_name),
        base_model=base_name,
    )
    return Difference(adapter, unchanged, tuple(skipped), tuple(comparison.notes))


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    found: Difference,
    rule: RankRule,
    options: ComputeOptions | None = None,
    *,
    scratch_folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FoldResult:
    """Return the LoRA between two checkpoints.

    Args:
        base: before.
        tuned: after.
        found: what `difference` says of them.
        rule: how ranks are chosen.
        options: how to compute and store; factors are float32 unless it says otherwise.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: no rule.
        AdapterError: NaN or infinite values.
    """
    options = options or ComputeOptions()
    result = to_lora(found.adapter, rule, options, scratch_folder=scratch_folder, progress=progress)
    record = operation_record(
        "extract", {}, {"rule": as_options(rule), **options.record()}, base, tuned
    )
    files = {"base": base.files, "tuned": tuned.files}
    adapter = replace(
        result.adapter,
        metadata=record_metadata(record),
        provenance=record,
        other_inputs={role: tuple(f.file for f in shards) for role, shards in files.items()},
    )
    return replace(result, adapter=adapter)


def extract_choices(found: Difference, options: ComputeOptions | None = None) -> FoldChoices:
    """Return what ranks would cost and lose.

    Raises:
        AdapterError: NaN or infinite values.
    """
    choices = fold_choices(found.adapter, options)
    assert choices is not None
    return choices


@dataclass(frozen=True)
class _Pair:
    """One tensor of both checkpoints.

    Attributes:
        key: its name in the base.
        old: before.
        new: after.
        use: what becomes of it if it changed: a `layer` to adapt, a tensor to carry `whole`, or
            `none` if a LoRA has no place for it.
        layer: what the module is.
        crossed: whether it is stored as (in, out).
    """

    key: str
    old: TensorRef
    new: TensorRef
    use: Literal["layer", "whole", "none"]
    layer: Layer = _LINEAR
    crossed: bool = False

    @property
    def module(self) -> str:
        """Path of the module it belongs to."""
        return self.key.rpartition(".")[0]

    def differs(self) -> bool:
        """Return whether any value changed, reading both a block at a time."""
        if self.old.shape != self.new.shape:
            return True
        same_type = self.old.dtype == self.new.dtype
        step = _BLOCK_BYTES // 8
        for start in range(0, self.old.numel, step):
            stop = min(start + step, self.old.numel)
            one, other = self.old.elements(start, stop), self.new.elements(start, stop)
            if same_type and one.tobytes() == other.tobytes():
                continue
            if not np.array_equal(one.astype(np.float64), other.astype(np.float64)):
                return True
        return False

    def replacement(self) -> Replacement:
        """Return the new tensor as one that replaces the old."""
        leaf = self.key.rpartition(".")[2]
        if is_embedding(self.module):
            return Replacement("embedding", self.key, self.new)
        return Replacement("bias" if leaf == "bias" else "other", self.key, self.new)

    def delta(self) -> OtherDelta:
        """Return the difference, computed when it is read."""
        source = _DifferenceSource(self.old, self.new)
        diff = in_file(self.key, DTYPES["F64"], self.new.shape, source, 0)
        settings = {"scale": 1.0, "crossed": self.crossed}
        return OtherDelta("full", {"diff": diff}, settings, self.layer)


@dataclass(frozen=True)
class _DifferenceSource:
    """new − old in float64, as a place to read elements from."""

    old: TensorRef
    new: TensorRef

    def read_at(self, offset: int, nbytes: int) -> Buffer:
        """Return the bytes of elements of the difference."""
        start, stop = offset // 8, (offset + nbytes) // 8
        new = self.new.elements(start, stop).astype(np.float64)
        values = np.ascontiguousarray(new - self.old.elements(start, stop).astype(np.float64))
        return memoryview(values.view(np.uint8).data)


class _Comparison:
    """Both checkpoints, and what each of their tensors is."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned
        self.notes: list[str] = []
        config = base.config.get("text_config") or base.config
        heads = [key for key in base.tensors if key.rpartition(".")[0].endswith("lm_head")]
        self.is_tied = bool(config.get("tie_word_embeddings")) or not heads

    def pairs(self) -> list[_Pair]:
        """Return every tensor of both.

        Raises:
            AdapterError: one is in only one of them, or of another shape.
        """
        names = Names(self.tuned)
        found: set[str] = set()
        pairs = []
        for key, old in self.base.tensors.items():
            other = names.find(key)
            if other is None:
                if not self._is_tied_copy(key, self.base):
                    raise self._alone(key, self.base, self.tuned)
                self.notes.append(f"{key} is tied in the tuned checkpoint and not compared")
                continue
            found.add(other)
            pairs.append(self._pair(key, old, self.tuned.tensors[other]))
        for key in self.tuned.tensors:
            if key not in found:
                if not self._is_tied_copy(key, self.tuned):
                    raise self._alone(key, self.tuned, self.base)
                self.notes.append(f"{key} is tied in the base checkpoint and not compared")
        return pairs

    def _alone(self, key: str, here: Checkpoint, there: Checkpoint) -> AdapterError:
        return AdapterError(
            "a tensor is in only one of the checkpoints",
            path=here.path,
            tensor=key,
            expected=f"the same tensor in {there.path.name}",
        )

    def _is_tied_copy(self, key: str, checkpoint: Checkpoint) -> bool:
        """Return whether a tensor is an output embedding that repeats the input embedding."""
        ref = checkpoint.tensors[key]
        if not key.rpartition(".")[0].endswith("lm_head"):
            return False
        return any(
            is_embedding(other.rpartition(".")[0])
            and tensor.shape == ref.shape
            and not _Pair(key, tensor, ref, "none").differs()
            for other, tensor in checkpoint.tensors.items()
            if len(tensor.shape) == 2
        )

    def _pair(self, key: str, old: TensorRef, new: TensorRef) -> _Pair:
        module, _, leaf = key.rpartition(".")
        dims = len(old.shape)
        resizable = is_embedding(module) or module.endswith("lm_head")
        if old.shape != new.shape and not (
            resizable and dims == 2 and old.shape[1:] == new.shape[1:]
        ):
            raise AdapterError(
                "a tensor has another shape in the tuned checkpoint",
                path=self.tuned.path,
                tensor=key,
                got=list(new.shape),
                expected=list(old.shape),
            )
        if not (old.dtype.floating and new.dtype.floating):
            return _Pair(key, old, new, "none")
        if dims <= 1 or old.shape != new.shape or (resizable and self.is_tied):
            return _Pair(key, old, new, "whole")
        if leaf != "weight" or dims > 5:
            return _Pair(key, old, new, "none")
        if dims > 2:
            return _Pair(key, old, new, "layer", Layer("conv", kernel=old.shape[2:]))
        if is_embedding(module):
            return _Pair(key, old, new, "layer", Layer("embedding"), crossed=True)
        crossed = is_conv1d(key, self.base.config)
        if not crossed and "model_type" not in self.base.config:
            self._refuse_unknown_layout(key, module)
        layer = Layer("linear", transposed_if_square=crossed)
        return _Pair(key, old, new, "layer", layer, crossed)

    def _refuse_unknown_layout(self, key: str, module: str) -> None:
        if module.rpartition(".")[2] in CONV1D_LEAVES:
            raise UnsupportedError(
                "whether the weight is stored as (in, out) does not show",
                path=self.base.path,
                tensor=key,
                hint="Give the folder with the base's config.json",
            )

    def config(self, modules: Mapping[str, Delta], base_name: str | None) -> dict[str, Any]:
        """Return a PEFT configuration; ranks and scales are the writer's."""
        classes = self.base.config.get("architectures")
        causal = isinstance(classes, list) and any(
            isinstance(name, str) and name.endswith("ForCausalLM") for name in classes
        )
        layers = [d.layer for d in modules.values() if isinstance(d, OtherDelta)]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM" if causal else None,
            "base_model_name_or_path": base_name,
            "bias": "none",
            "fan_in_fan_out": any(layer.transposed_if_square for layer in layers),
            "inference_mode": True,
            "r": 1,
            "lora_alpha": 1,
            "target_modules": sorted(modules),
        }
