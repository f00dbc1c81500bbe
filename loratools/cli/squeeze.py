"""`loratools squeeze`."""

from __future__ import annotations

from pathlib import Path

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.by_type import Column, print_modules
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
from loratools_formats.disk.errors import OptionError, and_more


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
    errors = [module.relative_error for module in modules]
    ranks = [f"{module.rank_in} → {module.rank_out}" for module in modules]
    before, after = [m.rank_in for m in modules], [m.rank_out for m in modules]
    columns = [
        Column("rank", ranks, str),
        Column("rank before", before, str, listed=False, summed=True),
        Column("after", after, str, listed=False, summed=True),
        Column("energy kept", [module.energy for module in modules], percent),
        Column("relative error", errors, summed=True),
    ]
    if result.calibrated_error is not None:
        for_inputs = [module.calibrated_error or 0.0 for module in modules]
        columns.append(Column("for the inputs", for_inputs, summed=True))
    names = [module.name for module in modules]
    print_modules("module", names, columns, errors, verbose=verbose)
    if result.kept_whole:
        note(f"kept as they are, for they have no factors: {and_more(result.kept_whole)}")
    of_what = " of the DoRA direction" if result.directional else ""
    say(f"relative error{of_what}: {number(result.relative_error)}")
    if result.calibrated_error is not None:
        say(f"relative error for the inputs: {number(result.calibrated_error)}")
    say(f"size: {sizes(result.bytes_in, result.bytes_out)}")
