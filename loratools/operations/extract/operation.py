"""The LoRA between two checkpoints: what a full or sparse fine-tune changed, at a chosen rank.

Every tensor of the two is compared. Linear layers, convolutions and embeddings that changed become
differences of full rank, which `fold` approximates, streamed from both files; so do the stacked
weights of experts, matrix by matrix, in the form of PEFT's `target_parameters`. Norms, biases and
embeddings that are tied or were resized are carried whole, as replacements; anything else that
changed is refused. Tensors that did not change are left out.
Modules are named as the base's class names them in memory, which is where PEFT looks for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loratools.algebra.ranks import RankRule, as_options
from loratools.base.dequantised import dequantised, rounded_as
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.extract.config import peft_config
from loratools.operations.extract.pairs import Comparison, Pair
from loratools.operations.to_lora import ToLoraChoices, ToLoraResult, to_lora, to_lora_choices
from loratools.work.declared import option
from loratools.work.parallel import in_order, usable_cores
from loratools.work.provenance import operation_record
from loratools.work.requests import Progress
from loratools.work.selection import Selection
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.core.adapter import Adapter
from loratools_formats.core.change import ModuleChange
from loratools_formats.core.findings import Finding
from loratools_formats.core.peft_facts import nested_paths, refused_modules, replaced_name
from loratools_formats.disk.errors import AdapterError, UnsupportedError


@dataclass(frozen=True)
class Naming:
    """How the output names the base model and its modules.

    Attributes:
        base_name: name to record as the base model's.
        to: write a single file of a diffusion model: kohya, comfyui or diffusers; by default a PEFT
            folder.
        component: the part of a pipeline that the checkpoint is, if its names do not show it.
    """

    base_name: str | None = option(None, heading="Output", metavar="NAME")
    to: Literal["peft", "kohya", "comfyui", "diffusers"] | None = option(None, heading="Output")
    component: str | None = option(None, heading="Input", metavar="NAME")


@dataclass(frozen=True)
class Difference:
    """What changed between two checkpoints, not yet of low rank.

    Attributes:
        adapter: full differences by module, and replacements.
        unchanged: number of tensors that are the same.
        skipped: tensors that changed and were not selected.
        findings: what a user should know.
    """

    adapter: Adapter
    unchanged: int
    skipped: tuple[str, ...]
    findings: tuple[Finding, ...]


def difference(
    base: Checkpoint,
    tuned: Checkpoint,
    selection: Selection | None = None,
    *,
    base_name: str | None = None,
    workers: int | None = None,
) -> Difference:
    """Compare two checkpoints.

    Args:
        base: before.
        tuned: after.
        selection: modules to take; others that changed are left out and listed.
        base_name: what to record as the base model; by default what its configuration says.
        workers: threads over tensors, the usable cores by default.

    Raises:
        AdapterError: a tensor is in only one of the two, or of another shape, or nothing changed.
        UnsupportedError: a tensor that has no place in a LoRA changed.
    """
    selection = selection or Selection()
    old, new = dequantised(base), dequantised(tuned)
    comparison = Comparison(rounded_as(old, new), rounded_as(new, old), selection)
    pairs = comparison.pairs()
    changed = in_order(lambda pair: pair.differs(), pairs, workers or usable_cores())
    differing = [pair for pair, differs in zip(pairs, changed, strict=True) if differs]
    unchanged = len(pairs) - len(differing)
    skipped = [pair.key for pair in differing if pair.module not in selection]
    chosen = [pair for pair in differing if pair.module in selection]
    placeless = [pair for pair in chosen if pair.use == "none"]
    if placeless:
        pair = placeless[0]
        others = [pair.module for pair in pairs if pair.use != "none"]
        raise UnsupportedError(
            "a tensor that has no place in a LoRA changed",
            path=tuned.path,
            tensor=pair.key,
            got=f"{pair.new.dtype.code} {list(pair.new.shape)}",
            hint=f"{pair.hint}: {comparison.pattern((p.module for p in placeless), others)}",
        )
    modules = _deltas([pair for pair in chosen if pair.use == "layer"])
    refused = refused_modules(base.config.get("model_type"), modules)
    if refused:
        leaves = {name.rpartition(".")[2] for name in refused}
        raise UnsupportedError(
            "PEFT adapts no module of this name in a model of this type",
            path=base.path,
            tensor=refused[0],
            got=f"{len(refused)} such modules that changed, in {base.config['model_type']}",
            hint="Leave them out with `exclude`: "
            + comparison.besides_given("|".join(rf"\.{leaf}$" for leaf in sorted(leaves))),
        )
    replacements = {pair.key: pair.replacement() for pair in chosen if pair.use == "whole"}
    replacements |= comparison.heads
    if not modules and not replacements:
        raise AdapterError(
            "nothing to extract",
            path=tuned.path,
            got=f"{unchanged} tensors that did not change, {len(skipped)} not selected",
        )
    if not modules:
        raise AdapterError(
            "none of the weights that a LoRA could change has changed",
            path=tuned.path,
            got=f"{len(replacements)} changed norms, biases or embeddings",
            hint="A LoRA needs at least one module",
        )
    adapter = Adapter(
        format="peft",
        source=None,
        modules=modules,
        replacements={
            replaced_name(key, modules): replacement for key, replacement in replacements.items()
        },
        config=peft_config(comparison.base, modules, comparison.heads, comparison.task, base_name),
        base_model=base_name,
    )
    return Difference(adapter, unchanged, tuple(skipped), tuple(comparison.findings))


def _deltas(pairs: Iterable[Pair]) -> dict[str, ModuleChange]:
    """Return the differences by the names that PEFT gives them."""
    found: dict[str, dict[str, Pair]] = {}
    for pair in pairs:
        found.setdefault(pair.module, {})[pair.key] = pair
    named = {
        path: group[key].delta()
        for module, group in found.items()
        for key, path in nested_paths(module, group).items()
    }
    return {name: named[name] for name in sorted(named)}


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    found: Difference,
    rule: RankRule,
    options: ComputeOptions | None = None,
    *,
    to: str | None = None,
    scratch_folder: Path | None = None,
    progress: Progress | None = None,
) -> ToLoraResult:
    """Return the LoRA between two checkpoints.

    Args:
        base: before.
        tuned: after.
        found: what `difference` says of them.
        rule: how ranks are chosen.
        options: how to compute and store; factors are float32 unless it says otherwise.
        to: the naming that the modules will be given, for the record.
        scratch_folder: where results wait until they are written.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: no rule.
        AdapterError: NaN or infinite values.
    """
    options = options or ComputeOptions()
    parameters = {"rule": as_options(rule), **options.record(), "seed": options.seed}
    parameters |= {} if to is None else {"to": to}
    files = {"base": base.files, "tuned": tuned.files}
    other_inputs = {role: tuple(f.file for f in shards) for role, shards in files.items()}
    return to_lora(
        replace(found.adapter, other_inputs=other_inputs),
        rule,
        options,
        record=lambda: operation_record("extract", {}, parameters, base, tuned),
        scratch_folder=scratch_folder,
        progress=progress,
    )


def extract_choices(found: Difference, options: ComputeOptions | None = None) -> ToLoraChoices:
    """Return what ranks would cost and lose.

    Raises:
        AdapterError: NaN or infinite values.
    """
    choices = to_lora_choices(found.adapter, options)
    assert choices is not None
    return choices
