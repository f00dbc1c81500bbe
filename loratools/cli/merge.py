"""`loratools merge`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.outcome import checked_target, conclude, exceeds, planned_nbytes, scratch_folder
from loratools.cli.output import (
    human_bytes,
    note,
    number,
    percent,
    print_json,
    print_table,
    progress_bar,
)
from loratools.cli.references import weighted_path
from loratools.factors.resize import ComputeOptions
from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.methods import get_method
from loratools.operations.merge.operation import merge
from loratools.operations.merge.options import MergeOptions, Parameters
from loratools.operations.merge.recipe import (
    RECIPE_FILE,
    Recipe,
    RecipeAdapter,
    RecipeFiles,
    load_recipe,
    recipe_text,
)
from loratools.operations.merge.result import MergeResult
from loratools.work.declared import declared
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats import get_format, read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import (
    AdapterError,
    OptionError,
    OutputError,
    OutputExistsError,
)
from loratools_formats.disk.publish import publish_file


@named_command("merge")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[:WEIGHT]...")
@shared.writes("max_error", positional=False)
@shared.takes(MergeOptions, into="options")
@shared.takes(Parameters, into="parameters")
@shared.takes(RecipeFiles, into="files")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute", without=("--method",))
@shared.reads("base", "from_", "carry_unknown")
@shared.reports()
@click.pass_context
def command(
    context: click.Context,
    /,
    adapters: tuple[str, ...],
    writing: Writing,
    options: MergeOptions,
    parameters: Parameters,
    files: RecipeFiles,
    rule: RankRule,
    compute: ComputeOptions,
    reading: Reading,
    reporting: Reporting,
) -> int:
    """Merge adapters of any rank, scale and type into one.

    A weight follows the path after a colon and is 1 by default. Weights may be negative.

    \b
    loratools merge chat:0.7 code:0.3 -o both
    loratools merge chat code --method ties --density 0.3 --rank 32 -o both
    """  # noqa: D301 - click reads the backspace
    if files.recipe is not None:
        plan = _from_recipe(context, files.recipe, compute)
    elif adapters:
        checked = get_method(options.method).checked(parameters.given())
        plan = Recipe(
            tuple(RecipeAdapter(*weighted_path(text)) for text in adapters),
            replace(options, parameters=checked, rule=rule, compute=compute),
            reading.base,
        )
    else:
        raise OptionError("no adapters to merge", hint="Name some, or pass `recipe=FILE`")
    inputs = _inputs(plan, reading, quiet=reporting.quiet)
    bases = {item.adapter.base_model for item in inputs} - {None}
    if len(bases) > 1 and plan.options.force_base and not reporting.quiet:
        note(f"the adapters name different base models: {', '.join(sorted(map(str, bases)))}")
    read = [*(item.path for item in plan.adapters), plan.base, files.recipe]
    target = checked_target(writing, read)
    save_recipe = None if writing.dry_run else files.save_recipe
    _check_recipe_target(save_recipe, overwrite=writing.overwrite)
    with progress_bar("merge", quiet=reporting.quiet) as progress:
        result = merge(
            inputs,
            plan.options,
            base=None if plan.base is None else read_checkpoint(plan.base),
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    if not exceeds(result.relative_error, writing.max_error):
        _write(result, plan, inputs, target, overwrite=writing.overwrite)
        _save_recipe(plan, inputs, save_recipe, overwrite=writing.overwrite)
    if reporting.json:
        print_json(_as_json(plan, inputs, result))
    elif not reporting.quiet:
        _print_report(inputs, result)
    return conclude(result.relative_error, writing, target, reporting)


def _from_recipe(context: click.Context, path: Path, compute: ComputeOptions) -> Recipe:
    """Return what a recipe says; only where and with how many threads to compute is not in it.

    Raises:
        OptionError: an option was given that a recipe says.
    """
    declarations = (MergeOptions, Parameters, RankRule, ComputeOptions)
    in_recipes = {option.name for cls in declarations for option in declared(cls)}
    in_recipes |= {"adapters", "base"}
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in in_recipes - {"workers", "device"}
        and context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise OptionError("a recipe says this already", got=", ".join(given))
    loaded = load_recipe(path)
    kept = replace(loaded.options.compute, workers=compute.workers, device=compute.device)
    return replace(loaded, options=replace(loaded.options, compute=kept))


def _inputs(plan: Recipe, reading: Reading, *, quiet: bool) -> list[MergeInput]:
    inputs: list[MergeInput] = []
    names: list[str] = []
    for item in plan.adapters:
        adapter = read_adapter(item.path, reading.from_, carry_unknown=reading.carry_unknown)
        if item.sha256 is not None and adapter.inputs[0].sha256() != item.sha256:
            raise AdapterError(
                "the adapter is not the one that the recipe was made with",
                path=item.path,
                expected=f"weights with sha256 {item.sha256}",
            )
        for text in () if quiet else adapter.notes:
            note(text)
        name = Path(os.path.realpath(item.path)).name
        names.append(name)
        count = names.count(name)
        inputs.append(MergeInput(adapter, item.weight, f"{name}#{count}" if count > 1 else name))
    return inputs


def _recipe(plan: Recipe, inputs: Sequence[MergeInput], folder: Path) -> bytes:
    return recipe_text(plan, [item.adapter.inputs[0].sha256() for item in inputs], folder)


def _check_recipe_target(path: Path | None, *, overwrite: bool) -> None:
    """Refuse early a recipe that could not be published."""
    if path is None:
        return
    if path.exists() and not overwrite:
        raise OutputExistsError(
            "output exists", path=path, hint="Pass `overwrite=True` to replace it"
        )
    if not Path(os.path.realpath(path)).parent.is_dir():
        raise OutputError(
            "the folder to write into does not exist", path=Path(os.path.realpath(path)).parent
        )


def _save_recipe(
    plan: Recipe, inputs: Sequence[MergeInput], path: Path | None, *, overwrite: bool
) -> None:
    if path is None:
        return
    with publish_file(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(_recipe(plan, inputs, Path(os.path.realpath(path)).parent))


def _write(
    result: MergeResult,
    plan: Recipe,
    inputs: Sequence[MergeInput],
    target: Path | None,
    *,
    overwrite: bool,
) -> None:
    if target is None:
        return
    place = Path(os.path.realpath(target))
    is_folder = get_format(result.adapter.format).is_folder
    recipe = _recipe(plan, inputs, place if is_folder else place.parent)
    attachments = {**result.adapter.attachments, RECIPE_FILE: recipe}
    adapter = replace(result.adapter, attachments=attachments)
    write_adapter(adapter, target, adapter.format, overwrite=overwrite)


def _sizes(inputs: Sequence[MergeInput], result: MergeResult) -> tuple[int, int]:
    before = sum(item.adapter.weights_nbytes for item in inputs)
    return before, planned_nbytes(result.adapter)


def _as_json(plan: Recipe, inputs: Sequence[MergeInput], result: MergeResult) -> dict[str, object]:
    bytes_in, bytes_out = _sizes(inputs, result)
    return {
        "operation": "merge",
        "method": plan.options.method,
        "adapters": [{"name": item.name, "weight": item.weight} for item in inputs],
        "relative_error": result.relative_error,
        "energy": result.energy,
        "factor_residual": result.factor_residual,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
        "modules": [
            {
                "name": module.name,
                "ranks_in": list(module.ranks_in),
                "rank_out": module.rank_out,
                "energy": module.energy,
                "relative_error": module.relative_error,
                "absent": list(module.absent),
            }
            for module in result.modules
        ],
    }


def _ranks(ranks: Sequence[int | None]) -> str:
    return " + ".join("–" if rank is None else str(rank) for rank in ranks)


def _print_report(inputs: Sequence[MergeInput], result: MergeResult) -> None:
    print_table(
        ["module", "rank", "energy kept", "relative error"],
        "<>>>",
        [
            [
                module.name,
                f"{_ranks(module.ranks_in)} → {module.rank_out}",
                percent(module.energy),
                number(module.relative_error),
            ]
            for module in result.modules
        ],
    )
    for item in inputs:
        count = sum(item.name in module.absent for module in result.modules)
        if count:
            note(f"{item.name} lacks {count} of {len(result.modules)} modules; they count as zero")
    bytes_in, bytes_out = _sizes(inputs, result)
    click.echo(f"energy kept: {percent(result.energy)}")
    click.echo(f"relative error: {number(result.relative_error)}")
    if result.factor_residual is not None:
        click.echo(f"error of averaging factors instead: {number(result.factor_residual)}")
    click.echo(f"size: {human_bytes(bytes_in)} → {human_bytes(bytes_out)}")
