"""`loratools squeeze`."""

from __future__ import annotations

from pathlib import Path

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.output import note, number, percent, print_table, say, sizes
from loratools.cli.pages import Pages
from loratools.cli.perform import perform, show_choices, target_of
from loratools.face.squeeze import SqueezeResult, squeeze, squeeze_choices
from loratools.lowrank.resize import ComputeOptions
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Selection


@named_command("squeeze")
@shared.adapter_argument
@shared.writes("in_place", "max_error")
@shared.takes(RankRule, into="rule")
@shared.takes(ComputeOptions, into="compute")
@shared.takes(Selection, into="selection")
@shared.reads("initial", "from_", "carry_unknown", "ignore_key")
@shared.takes(Pages, "html", "plot", into="pages")
@shared.reports()
def command(
    adapter: Path,
    writing: Writing,
    rule: RankRule,
    compute: ComputeOptions,
    selection: Selection,
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
        "reading": reading,
    }
    if not rule.is_given:
        return show_choices(squeeze_choices(adapter, **given), writing, reporting, pages=pages)
    target = target_of(writing)
    return perform(
        "squeeze",
        lambda progress: squeeze(adapter, rule=rule, writing=target, progress=progress, **given),
        _show,
        target,
        reporting,
        pages=pages,
    )


def _show(result: SqueezeResult) -> None:
    print_table(
        ["module", "rank", "energy kept", "relative error"],
        "<>>>",
        [
            [
                module.name,
                f"{module.rank_in} → {module.rank_out}",
                percent(module.energy),
                number(module.relative_error),
            ]
            for module in result.modules
        ],
    )
    if result.kept_whole:
        count, first = len(result.kept_whole), result.kept_whole[0]
        more = f" and {count - 1} more" if count > 1 else ""
        note(f"kept as they are, for they have no factors: {first}{more}")
    of_what = " of the DoRA direction" if result.directional else ""
    say(f"relative error{of_what}: {number(result.relative_error)}")
    say(f"size: {sizes(result.bytes_in, result.bytes_out)}")
