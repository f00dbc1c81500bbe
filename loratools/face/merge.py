"""`merge`: several adapters as one."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from loratools.algebra.ranks import RankRule
from loratools.base.named_base import distinct_bases
from loratools.face.declare import public
from loratools.face.result import AdapterResult, InputAdapter, check_error
from loratools.face.source import (
    READING,
    WRITING,
    Mergeable,
    Model,
    beside,
    destination,
    label,
    left,
    model_or_pipeline,
    opened,
    weighted,
)
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge import operation
from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.methods import get_method
from loratools.operations.merge.options import MergeOptions, Parameters
from loratools.operations.merge.recipe import (
    Recipe,
    RecipeAdapter,
    load_recipe,
    with_local_paths,
)
from loratools.operations.merge.recipe_text import recipe_text
from loratools.operations.merge.result import MergeModuleReport
from loratools.operations.reported import written_nbytes
from loratools.work.call import call_of, running
from loratools.work.json_object import hidden
from loratools.work.requests import Progress, Reading, Writing
from loratools.work.selection import Dropping
from loratools_formats.checkpoints.checkpoint import Checkpoint
from loratools_formats.contract.files import check_apart, write_adapter
from loratools_formats.contract.path_kinds import is_model
from loratools_formats.contract.registry import get_format
from loratools_formats.core.findings import Finding
from loratools_formats.disk.errors import AdapterError, OptionError, UnknownFormatError, and_more
from loratools_formats.disk.provenance import RECIPE_FILE
from loratools_formats.disk.publish import publish_file


@dataclass(frozen=True, kw_only=True, repr=False)
class MergeResult(AdapterResult):
    """A merged adapter.

    Attributes:
        method: name of the method.
        adapters: what was merged, in order.
        relative_error: ‖ΔW − ΔW'‖/‖ΔW‖ over all modules together, against what the method defines.
        energy: share of ‖ΔW‖²_F in the singular values kept.
        factor_residual: for `fedex`, how far the product of averaged factors would be from the
            averaged product; None for other methods or where factors cannot be averaged.
        bytes_in: size of the inputs' weight files.
        bytes_out: size of the output's.
        modules: one report each, in path order.
        recipe: everything the merge needs, to be repeated from; None if an adapter is in no file.
    """

    operation: ClassVar[str] = "merge"

    method: str
    adapters: tuple[InputAdapter, ...]
    relative_error: float
    energy: float
    factor_residual: float | None
    bytes_in: int
    bytes_out: int
    modules: tuple[MergeModuleReport, ...]
    recipe: Recipe | None = hidden()

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the adapter in its format with its recipe, whole or not at all; return where.

        Raises:
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: it could not be written; what stood there is intact.
        """
        place = Path(os.path.realpath(path))
        adapter = self.adapter
        if self.recipe is not None:
            folder = place if get_format(adapter.format).is_folder else place.parent
            recipe = self._recipe_text(self.recipe, folder)
            adapter = replace(adapter, attachments={**adapter.attachments, RECIPE_FILE: recipe})
        write_adapter(adapter, path, adapter.format, overwrite=overwrite)
        return Path(path)

    def write_recipe(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the recipe alone, with paths relative to its folder; return where.

        Raises:
            OptionError: an adapter is in no file, so that no recipe can name it.
            OutputExistsError: the output exists and `overwrite` is false.
            OutputError: it could not be written; what stood there is intact.
        """
        if self.recipe is None:
            raise OptionError("an adapter is in no file, so that no recipe can name it")
        check_apart(path, [*(item.path for item in self.recipe.adapters), self.recipe.base])
        text = self._recipe_text(self.recipe, Path(os.path.realpath(path)).parent)
        with publish_file(path, overwrite=overwrite) as temporary:
            temporary.write_bytes(text)
        return Path(path)

    def _recipe_text(self, recipe: Recipe, folder: Path) -> bytes:
        return recipe_text(recipe, [item.sha256 or "" for item in recipe.adapters], folder)


@public(reading=READING, writing=(*WRITING, "max_error"))
def merge(
    adapters: Mergeable,
    *,
    base: Model | None = None,
    options: MergeOptions,
    parameters: Parameters,
    rule: RankRule,
    compute: ComputeOptions,
    dropping: Dropping,
    reading: Reading,
    writing: Writing,
    progress: Progress | None = None,
) -> MergeResult:
    """Merge adapters of any rank, scale and kind into one.

    The first adapter gives the format and the settings of the result.

    >>> import loratools as lt
    >>> one, other = "examples/tiny-llama/lora", "examples/tiny-llama/rslora"
    >>> lt.merge({one: 0.7, other: 0.3}, rank=8).modules[0].rank_out
    8

    Args:
        adapters: a mapping of paths to weights, a sequence of adapters or (adapter, weight), or the
            path of a recipe, which then states everything except `workers`, `device` and the
            output.
        base: the base model, if an adapter is a DoRA.
        progress: called with (modules done, modules in all).

    Raises:
        OptionError: options that do not fit the method, each other, the adapters or the recipe.
        InexactError: the error is above `max_error`; the error carries the result.
        AdapterError: adapters that do not fit together, or NaN and infinite values.
        UnsupportedError: an adapter whose factors do not determine its ΔW, or a DoRA without its
            base.
        OutputExistsError: the output exists and `overwrite` is false.
    """
    if isinstance(adapters, str | os.PathLike):
        given = replace(
            options,
            rule=rule,
            compute=compute,
            parameters=parameters.given(),
            dropping=dropping,
        )
        plan = _from_file(Path(adapters), given, base)
        sources = [(item.path, item.weight) for item in plan.adapters]
        chosen, base = plan.options, base if plan.base is None else plan.base
        digests = [item.sha256 for item in plan.adapters]
    else:
        checked = get_method(options.method).checked(parameters.given())
        chosen = replace(options, rule=rule, compute=compute, parameters=checked, dropping=dropping)
        sources = weighted(adapters)
        digests = [None] * len(sources)
    inputs = _inputs(sources, digests, reading, chosen.dropping)
    checkpoint = None if base is None else model_or_pipeline(base)
    writing = destination(writing, None, [*(item.adapter for item in inputs), checkpoint])
    # A merge from a recipe is recorded as the call that the recipe stands for.
    settings = Parameters(set_=tuple(chosen.parameters.items()))
    groups = [chosen, settings, chosen.rule, chosen.compute, chosen.dropping, reading]
    with running(call_of("merge", {"adapters": sources, "base": base}, groups)):
        done = operation.merge(
            inputs, chosen, base=checkpoint, scratch_folder=beside(writing), progress=progress
        )
    result = MergeResult.of(
        done,
        findings=(*_findings(inputs), *done.findings, *_about_left_out(done.left_out)),
        method=chosen.method,
        adapters=tuple(InputAdapter(item.name, item.weight) for item in inputs),
        bytes_in=sum(item.adapter.weights_nbytes for item in inputs),
        bytes_out=written_nbytes(done.adapter),
        recipe=_recipe(inputs, chosen, checkpoint),
    )
    check_error(result, writing.max_error)
    return result.written(writing)


def _from_file(path: Path, given: MergeOptions, base: Model | None) -> Recipe:
    """Return what a recipe says, with this run's threads and device.

    Raises:
        OptionError: an option was given that the recipe decides.
    """
    workers, device = given.compute.workers, given.compute.device
    if given != MergeOptions(compute=ComputeOptions(workers=workers, device=device)) or base:
        raise OptionError("the recipe states all settings", path=path, hint="Leave out the others")
    plan = with_local_paths(load_recipe(path), path.parent)
    compute = replace(plan.options.compute, workers=workers, device=device)
    return replace(plan, options=replace(plan.options, compute=compute))


def _inputs(
    sources: Sequence[tuple[object, float]],
    digests: Sequence[str | None],
    reading: Reading,
    dropping: Dropping,
) -> list[MergeInput]:
    inputs: list[MergeInput] = []
    names: list[str] = []
    for (source, weight), digest in zip(sources, digests, strict=True):
        try:
            adapter = opened(source, reading)
        except UnknownFormatError as error:
            error.hint = _fuse_instead(source, sources) or error.hint
            raise
        if digest is not None and adapter.inputs[0].sha256() != digest:
            raise AdapterError(
                "the adapter is not the one that the recipe was made with",
                path=adapter.source,
                expected=f"weights with sha256 {digest}",
            )
        names.append(label(source))
        count = names.count(names[-1])
        inputs.append(MergeInput(adapter, weight, names[-1] + (f"#{count}" if count > 1 else "")))
    adapters = left([item.adapter for item in inputs], dropping)
    return [replace(item, adapter=a) for item, a in zip(inputs, adapters, strict=True)]


def _fuse_instead(source: object, sources: Sequence[tuple[object, float]]) -> str | None:
    """Return the command for those who name a model among the adapters; None if it is none."""
    paths = [path for path, _ in sources if isinstance(path, str | os.PathLike)]
    if not isinstance(source, str | os.PathLike) or not is_model(Path(source)):
        return None
    others = [shlex.quote(os.fspath(path)) for path in paths if path != source] or ["ADAPTER"]
    command = f"loratools fuse {shlex.quote(os.fspath(source))} {' '.join(others)} -o fused"
    return f"merge makes one adapter of several; to put adapters into a model: {command}"


def _findings(inputs: list[MergeInput]) -> tuple[Finding, ...]:
    bases = distinct_bases(item.adapter.base_model for item in inputs)
    found = [notice for item in inputs for notice in item.adapter.notices]
    if len(bases) > 1:
        message = f"the adapters name different base models: {', '.join(bases)}"
        found.append(Finding("different-bases", "warning", None, message))
    return tuple(found)


def _about_left_out(paths: tuple[str, ...]) -> list[Finding]:
    if not paths:
        return []
    message = f"left out, since every adapter's weight is 0 there: {and_more(paths)}"
    return [Finding("weightless-modules", "note", None, message)]


def _recipe(
    inputs: list[MergeInput], options: MergeOptions, base: Checkpoint | None
) -> Recipe | None:
    """Return the recipe of a merge; None if an adapter is not what its file holds."""
    adapters = []
    for item in inputs:
        adapter = item.adapter
        if adapter.source is None or not adapter.inputs or adapter.provenance is not None:
            return None
        digest = adapter.inputs[0].sha256()
        adapters.append(RecipeAdapter(adapter.source, item.weight, digest))
    return Recipe(tuple(adapters), options, None if base is None else base.path)
