"""`loratools merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.by_type import Column, print_modules
from loratools.cli.command import command as named_command
from loratools.cli.completion import path_completions
from loratools.cli.output import human_bytes, note, number, percent, say
from loratools.cli.pages import Pages, after
from loratools.cli.perform import perform, target_of
from loratools.cli.references import weighted_path
from loratools.face.merge import MergeResult, merge
from loratools.face.source import destination
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.merge.options import MergeOptions, Parameters
from loratools.operations.merge.recipe import RecipeFiles, read_of
from loratools.operations.merge.result import MergeModuleReport
from loratools.work.declared import declared
from loratools.work.requests import Progress, Reading, Reporting, Writing
from loratools.work.selection import Dropping
from loratools_formats.contract.files import check_further
from loratools_formats.disk.errors import OptionError


@named_command("merge")
@click.argument(
    "adapters", nargs=-1, metavar="ADAPTER[:WEIGHT]...", shell_complete=path_completions
)
@shared.writes("max_error", positional=False)
@shared.takes(MergeOptions, into="options")
@shared.takes(Parameters, into="parameters")
@shared.takes(RecipeFiles, into="files")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute", without=("--method",))
@shared.takes(Dropping, into="dropping")
@shared.reads("base", "from_", "carry_unknown", "ignore_key")
@shared.takes(Pages, "html", "plot", into="pages")
@shared.reports("json", "quiet", "verbose")
@click.pass_context
def command(
    context: click.Context,
    /,
    adapters: tuple[str, ...],
    writing: Writing,
    files: RecipeFiles,
    compute: ComputeOptions,
    dropping: Dropping,
    reading: Reading,
    pages: Pages,
    reporting: Reporting,
    **settings: Any,
) -> int:
    """Merge adapters of any rank, scale and type into one.

    A weight follows the path after a colon and is 1 by default. Weights may be negative.

    \b
    loratools merge chat:0.7 code:0.3 -o both
    loratools merge chat code --method ties --density 0.3 --rank 32 -o both
    """  # noqa: D301 - click reads the backspace
    sources: Path | list[tuple[Path, float]]
    if files.recipe is not None:
        _refuse_what_recipes_say(context)
        sources, settings, dropping = files.recipe, {}, Dropping()
        compute = ComputeOptions(workers=compute.workers, device=compute.device)
    elif adapters:
        sources = [weighted_path(text) for text in adapters]
    else:
        raise OptionError("no adapters to merge", hint="Name some, or pass `recipe=FILE`")
    target = target_of(writing, adapters[-1] if len(adapters) > 1 else None)
    others = read_of(sources) if isinstance(sources, Path) else [path for path, _ in sources]
    others += [path for path in (reading.base, target.output) if path is not None]
    pages.check(reporting, others, overwrite=writing.overwrite)
    save_recipe = None if writing.dry_run else files.save_recipe
    if save_recipe is not None:
        destination(Writing(output=save_recipe, overwrite=writing.overwrite), None, [])
        check_further(save_recipe, [*others, *pages.files], overwrite=writing.overwrite)

    def work(progress: Progress | None) -> MergeResult:
        result = merge(
            sources,
            base=reading.base,
            compute=compute,
            dropping=dropping,
            reading=reading,
            writing=target,
            progress=progress,
            **settings,
        )
        if save_recipe is not None:
            with after(target.output):
                result.write_recipe(save_recipe, overwrite=writing.overwrite)
        return result

    def show(result: MergeResult) -> None:
        _show(result, verbose=reporting.verbose)

    return perform("merge", work, show, target, reporting, pages=pages)


def _refuse_what_recipes_say(context: click.Context) -> None:
    """Refuse options that a recipe states; it states neither threads nor device.

    Raises:
        OptionError: one was given.
    """
    declarations = (MergeOptions, Parameters, RankRule, ComputeOptions, Dropping)
    names = {option.name for cls in declarations for option in declared(cls)}
    names = (names | {"adapters", "base"}) - {"workers", "device"}
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in names
        and context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise OptionError("the recipe states this already", got=", ".join(given))


def _ranks_of(module: MergeModuleReport) -> str:
    if module.rank_out is None:
        return "whole"
    before = " + ".join("–" if rank is None else str(rank) for rank in module.ranks_in)
    return f"{before} → {module.rank_out}"


def _show(result: MergeResult, *, verbose: bool) -> None:
    modules = result.modules
    errors = [module.relative_error for module in modules]
    columns = [
        Column("rank", [_ranks_of(module) for module in modules], str),
        Column("rank", [m.rank_out for m in modules], str, listed=False, summed=True),
        Column("energy kept", [module.energy for module in modules], percent),
        Column("relative error", errors, summed=True),
    ]
    names = [module.name for module in modules]
    print_modules("module", names, columns, errors, verbose=verbose)
    for item in result.adapters:
        count = sum(item.name in module.absent for module in result.modules)
        if count:
            note(f"{item.name} lacks {count} of {len(result.modules)} modules; they count as zero")
    say(f"energy kept: {percent(result.energy)}")
    say(f"relative error: {number(result.relative_error)}")
    if result.factor_residual is not None:
        say(f"error of averaging factors instead: {number(result.factor_residual)}")
    say(f"size: {human_bytes(result.bytes_in)} → {human_bytes(result.bytes_out)}")
