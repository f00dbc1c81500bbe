"""`loratools squeeze`."""

from __future__ import annotations

from pathlib import Path

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.by_type import Measure, ModuleTable, print_modules
from loratools.cli.command import command as named_command
from loratools.cli.many import one_or_many
from loratools.cli.output import note, number, percent, say, sizes
from loratools.cli.pages import Pages
from loratools.cli.perform import perform, show_choices, target_of
from loratools.face.squeeze import SqueezeResult, squeeze, squeeze_choices
from loratools.lowrank.moments import Calibration
from loratools.lowrank.resize import ComputeOptions
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Dropping, Selection
from loratools_formats.disk.errors import OptionError


@named_command("squeeze")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute")
@shared.takes(Selection, into="selection")
@shared.takes(Dropping, into="dropping")
@shared.takes(Calibration, into="calibration")
@shared.reads("initial", "from_", "carry_unknown", "ignore_key")
@shared.takes(Pages, "html", "plot", into="pages")
@shared.reports("json", "quiet", "verbose")
@one_or_many("in_place", "max_error")
def command(
    adapter: Path,
    writing: Writing,
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
    dropping: Dropping,
    calibration: Calibration,
    reading: Reading,
    pages: Pages,
    reporting: Reporting,
) -> int:
    """Compress an adapter's ranks with the smallest possible error.

    Without a rule for the ranks, prints the table rank → size → error and writes nothing.

    \b
    loratools squeeze my-adapter -o smaller --rank 16
    loratools squeeze my-adapter -o smaller --budget 25%
    """  # noqa: D301 - click reads the backspace
    inputs = [adapter, reading.initial, writing.output]
    pages.check(reporting, inputs, overwrite=writing.overwrite)
    given = {
        "compute": compute,
        "selection": selection,
        "initial": reading.initial,
        "dropping": dropping,
        "reading": reading,
    }
    if not rule.is_given:
        if calibration.stats is not None:
            raise OptionError("the table of ranks is not calibrated", hint="Give a `rank`, too")
        return show_choices(squeeze_choices(adapter, **given), writing, reporting, pages=pages)
    target = target_of(writing)
    return perform(
        "squeeze",
        lambda progress: squeeze(
            adapter, rule=rule, calibration=calibration, writing=target, progress=progress, **given
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
        pages=pages,
    )


def _show(result: SqueezeResult, *, verbose: bool) -> None:
    modules = result.modules
    rows = [
        [
            module.name,
            f"{module.rank_in} → {module.rank_out}",
            percent(module.energy),
            number(module.relative_error),
        ]
        for module in modules
    ]
    errors = [module.relative_error for module in modules]
    measures = {
        "rank before": Measure([module.rank_in for module in modules], str),
        "after": Measure([module.rank_out for module in modules], str),
        "relative error": Measure(errors),
    }
    header, align = ["module", "rank", "energy kept", "relative error"], "<>>>"
    if result.calibrated_error is not None:
        for_inputs = [module.calibrated_error or 0.0 for module in modules]
        header, align = [*header, "for the inputs"], f"{align}>"
        rows = [[*row, number(error)] for row, error in zip(rows, for_inputs, strict=True)]
        measures["for the inputs"] = Measure(for_inputs)
    print_modules(ModuleTable(header, align, rows, measures, errors), verbose=verbose)
    if result.kept_whole:
        count, first = len(result.kept_whole), result.kept_whole[0]
        more = f" and {count - 1} more" if count > 1 else ""
        note(f"kept as they are, for they have no factors: {first}{more}")
    of_what = " of the DoRA direction" if result.directional else ""
    say(f"relative error{of_what}: {number(result.relative_error)}")
    if result.calibrated_error is not None:
        say(f"relative error for the inputs: {number(result.calibrated_error)}")
    say(f"size: {sizes(result.bytes_in, result.bytes_out)}")
