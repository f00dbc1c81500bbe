"""`loratools repair`."""

from __future__ import annotations

from pathlib import Path

from loratools.base.decompositions import IntruderOptions
from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.measured import print_csv
from loratools.cli.output import number, print_table, say
from loratools.cli.pages import Pages
from loratools.cli.perform import perform, target_of
from loratools.face.repair import RepairResult, repair
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.repair.result import RepairOptions
from loratools.work.json_object import as_json
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Selection
from loratools_formats.disk.errors import printable


@named_command("repair")
@shared.adapter_argument
@shared.writes("in_place", "max_error")
@shared.reads("base", "from_", "carry_unknown", "ignore_key")
@shared.takes(RepairOptions, into="options")
@shared.takes(IntruderOptions, into="intruders")
@shared.takes(ComputeOptions, "dtype", "workers", into="compute")
@shared.takes(Selection, into="selection")
@shared.takes(Pages, "html", "plot", "csv", into="pages")
@shared.reports()
def command(
    adapter: Path,
    writing: Writing,
    reading: Reading,
    options: RepairOptions,
    intruders: IntruderOptions,
    compute: ComputeOptions,
    selection: Selection,
    pages: Pages,
    reporting: Reporting,
) -> int:
    """Shrink an adapter's intruder dimensions, drop dead modules, balance factors.

    Intruder dimensions are leading singular vectors of W + ΔW that are far from all singular
    vectors of W. Adapters with many of them forget more of what the base knew (arXiv 2410.21228).

    \b
    loratools repair my-adapter --base model -o repaired
    loratools repair my-adapter -o tidy --keep-intruders --drop-dead --rebalance
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing)
    pages.check(reporting, [adapter, reading.base, target.output], overwrite=writing.overwrite)
    return perform(
        "repair",
        lambda progress: repair(
            adapter,
            base=reading.base,
            options=options,
            judging=intruders,
            compute=compute,
            selection=selection,
            reading=reading,
            writing=target,
            progress=progress,
        ),
        _csv if pages.csv else _print_report,
        target,
        reporting,
        pages=pages,
    )


def _csv(result: RepairResult) -> None:
    print_csv(as_json(result.modules))


def _print_report(result: RepairResult) -> None:
    shown = [module for module in result.modules if module.action != "kept" or module.undetermined]
    if shown:
        print_table(
            ["module", "repair", "rank", "intruders", "change", "relative error"],
            "<<>>>>",
            [
                [
                    printable(module.name),
                    module.action,
                    f"{module.rank_in} → {module.rank_out}",
                    f"{module.intruders} + {module.undetermined}?"
                    if module.undetermined
                    else str(module.intruders),
                    number(module.change),
                    number(module.relative_error),
                ]
                for module in shown
            ],
        )
    kept = sum(module.action == "kept" for module in result.modules)
    say(f"modules: {len(result.modules) - kept} repaired, {kept} kept as they are")
    say(f"change: {number(result.change)} of ‖ΔW‖")
    say(f"relative error of what is stored: {number(result.relative_error)}")
