"""`loratools merge`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.options import weighted_path
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
from loratools.factors.resize import ComputeOptions
from loratools.operations.merge.align import MergeInput
from loratools.operations.merge.methods import get_method
from loratools.operations.merge.operation import merge
from loratools.operations.merge.options import MergeOptions, weight_override
from loratools.operations.merge.recipe import (
    RECIPE_FILE,
    Recipe,
    RecipeAdapter,
    load_recipe,
    recipe_text,
)
from loratools.operations.merge.result import MergeResult
from loratools_formats import get_format, read_adapter, write_adapter
from loratools_formats.checkpoints.checkpoint import read_checkpoint
from loratools_formats.disk.errors import (
    AdapterError,
    OptionError,
    OutputError,
    OutputExistsError,
)
from loratools_formats.disk.publish import publish_file


@click.command("merge")
@click.argument("adapters", nargs=-1, metavar="ADAPTER[:WEIGHT]...")
@shared.output_options
@click.option("--method", default="linear", show_default=True, help="See `loratools methods`.")
@click.option("--density", type=float, help="Share of entries kept.")
@click.option("--lambda", "lambda_", type=float, help="Factor of the result.")
@click.option("--majority-sign", type=click.Choice(["total", "frequency"]), help="How signs vote.")
@click.option(
    "--flavor",
    type=click.Choice(["peft", "paper", "mergekit"]),
    help="Whose definition, where they differ.",
)
@click.option("--normalize", is_flag=True, help="Divide linear's sum by the sum of weights.")
@click.option(
    "-p", "--param", multiple=True, metavar="NAME=VALUE", help="Any parameter of the method."
)
@click.option(
    "--space",
    type=click.Choice(["full", "core"]),
    default="full",
    show_default=True,
    help="core runs elementwise methods in the factors' shared space: cheap, low rank, and "
    "another method than on full weights.",
)
@click.option(
    "--weight-pattern",
    multiple=True,
    metavar="REGEX=W[,W...]",
    help="Weights in modules whose path matches: one for all adapters, or one each. Repeatable.",
)
@click.option("--replacements", help="Settle clashing saved modules: first, average or a NAME.")
@click.option("--base", type=shared.PATH, help="Base model; DoRA needs it.")
@click.option("--force-base", is_flag=True, help="Merge adapters of differently named bases.")
@click.option("--recipe", type=shared.PATH, help="Take all settings from a file.")
@click.option("--save-recipe", type=shared.PATH, help="Also write them there.")
@shared.rank_options
@shared.compute_options("--svd")
@shared.max_error_option
@shared.from_option
@shared.carry_unknown_option
@shared.json_option
@shared.quiet_option
@click.pass_context
def command(
    context: click.Context,
    /,
    adapters: tuple[str, ...],
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    recipe: Path | None,
    save_recipe: Path | None,
    max_error: float | None,
    format_name: str | None,
    carry_unknown: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Merge adapters of any rank, scale and type into one.

    A weight follows the path after a colon and is 1 by default. Weights may be negative.

    \b
    loratools merge chat:0.7 code:0.3 -o both
    loratools merge chat code --method ties --density 0.3 --rank 32 -o both
    """  # noqa: D301 - click reads the backspace
    plan = _plan(context, adapters, recipe, settings)
    inputs = _inputs(plan, format_name, carry_unknown=carry_unknown, quiet=quiet)
    sources = [item.adapter for item in inputs]
    bases = sorted({source.base_model for source in sources if source.base_model is not None})
    if len(bases) > 1 and plan.options.force_base and not quiet:
        note(f"the adapters name different base models: {', '.join(bases)}")
    target = checked_target(output, sources, [plan.base], overwrite=overwrite, dry_run=dry_run)
    save_recipe = None if dry_run else save_recipe
    _check_recipe_target(save_recipe, overwrite=overwrite)
    with progress_bar("merge", quiet=quiet) as progress:
        result = merge(
            inputs,
            plan.options,
            base=None if plan.base is None else read_checkpoint(plan.base),
            scratch_folder=scratch_folder(target),
            progress=progress,
        )
    if not exceeds(result.relative_error, max_error):
        _write(result, plan, inputs, target, overwrite=overwrite)
        _save_recipe(plan, inputs, save_recipe, overwrite=overwrite)
    if as_json:
        print_json(_as_json(plan, inputs, result))
    elif not quiet:
        _print_report(inputs, result)
    return conclude(result.relative_error, max_error, target, quiet=quiet)


def _plan(
    context: click.Context,
    adapters: tuple[str, ...],
    recipe: Path | None,
    settings: dict[str, Any],
) -> Recipe:
    """Return what to merge and how: from a recipe, or from the command line."""
    compute: ComputeOptions = settings["compute"]
    if recipe is not None:
        given = [
            parameter.opts[0]
            for parameter in context.command.params
            if parameter.name in (*_IN_RECIPES, "adapters")
            and context.get_parameter_source(parameter.name)
            is click.core.ParameterSource.COMMANDLINE
        ]
        if given:
            raise OptionError("a recipe says this already", got=", ".join(given))
        loaded = load_recipe(recipe)
        kept = replace(loaded.options.compute, workers=compute.workers, device=compute.device)
        return replace(loaded, options=replace(loaded.options, compute=kept))
    if not adapters:
        raise OptionError("no adapters to merge", hint="Name some, or pass --recipe")
    rule: RankRule = settings["rule"]
    method = get_method(settings["method"])
    return Recipe(
        tuple(_reference(text) for text in adapters),
        MergeOptions(
            method=settings["method"],
            parameters=method.checked(_parameters(settings)),
            rule=rule,
            compute=compute,
            space=settings["space"],
            overrides=tuple(weight_override(text) for text in settings["weight_pattern"]),
            replacements=settings["replacements"],
            force_base=settings["force_base"],
        ),
        settings["base"],
    )


_IN_RECIPES = (
    "method", "density", "lambda_", "majority_sign", "flavor", "normalize", "param", "space",
    "weight_pattern", "replacements", "base", "force_base", "rank", "energy", "sv_ratio", "sv_fro",
    "sv_cumulative", "threshold_rank", "budget", "max_rank", "min_rank", "rank_pattern", "uniform",
    "serve_ranks", "svd", "dtype", "oversample", "power_iterations", "seed", "keep_alpha",
)  # fmt: skip


def _parameters(settings: dict[str, Any]) -> dict[str, Any]:
    names = ("density", "lambda_", "majority_sign", "flavor")
    parameters = {n.rstrip("_"): settings[n] for n in names if settings[n] is not None}
    if settings["normalize"]:
        parameters["normalize"] = True
    for text in settings["param"]:
        name, separator, value = text.partition("=")
        if not separator:
            raise OptionError("not a parameter", got=text, expected="NAME=VALUE")
        parameters[name.replace("-", "_")] = value
    return parameters


def _reference(text: str) -> RecipeAdapter:
    return RecipeAdapter(*weighted_path(text))


def _inputs(
    plan: Recipe, format_name: str | None, *, carry_unknown: bool, quiet: bool
) -> list[MergeInput]:
    inputs: list[MergeInput] = []
    names: list[str] = []
    for item in plan.adapters:
        adapter = read_adapter(item.path, format_name, carry_unknown=carry_unknown)
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
        raise OutputExistsError("output exists", path=path, hint="Pass --overwrite to replace it")
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
