"""`loratools fleet share`."""

from __future__ import annotations

import click

from loratools.algebra.ranks import RankRule
from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.completion import path_completions
from loratools.cli.output import human_bytes, number, print_table, quantity, say, sizes
from loratools.cli.perform import perform, target_of
from loratools.face.fleet_share import FleetShareResult, fleet_share
from loratools.lowrank.resize import ComputeOptions
from loratools.operations.shared.options import RANK_OPTIONS, ShareOptions
from loratools.pipeline.fleet.sources import sources
from loratools.work.requests import Reading, Reporting, Writing
from loratools.work.selection import Dropping
from loratools_formats.disk.errors import printable

_SHOWN = 20


@named_command("fleet share")
@click.argument("adapters", nargs=-1, required=True, shell_complete=path_completions)
@shared.takes(ShareOptions, into="options")
@shared.takes(RankRule, *RANK_OPTIONS, into="rule")
@shared.takes(ComputeOptions, "dtype", "workers", into="compute")
@shared.takes(Dropping, into="dropping")
@shared.reads("from_", "carry_unknown", "ignore_key")
@shared.writes("max_error", positional=False)
@shared.reports("json", "quiet", "verbose")
def command(
    adapters: tuple[str, ...],
    options: ShareOptions,
    rule: RankRule,
    compute: ComputeOptions,
    dropping: Dropping,
    reading: Reading,
    writing: Writing,
    reporting: Reporting,
) -> int:
    """Store adapters of one base model in shared bases, with a small core for each.

    Adapters whose spaces overlap share one pair of bases per module, and each adds its core. The
    report states the error of each, beside the least error of squeezing each alone to the same
    size. ADAPTERS are paths, wildcards, folders that hold adapters, files that list them (.txt), or
    hf://organisation/*.

    \b
    loratools fleet share 'adapters/*' -o shared.safetensors --rank 64
    loratools fleet share adapters -o shared.safetensors --budget 20% --clusters 4
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing)
    given = sources(adapters)
    return perform(
        "fleet share",
        lambda progress: fleet_share(
            given,
            options=options,
            rule=rule,
            compute=compute,
            dropping=dropping,
            reading=reading,
            writing=target,
            progress=progress,
        ),
        lambda result: _show(result, verbose=reporting.verbose),
        target,
        reporting,
    )


def _show(result: FleetShareResult, *, verbose: bool) -> None:
    shown = result.adapters if verbose else result.adapters[:_SHOWN]
    rows = [
        [
            printable(one.name),
            str(one.group),
            human_bytes(one.bytes_in),
            number(one.relative_error),
            number(one.alone_error),
        ]
        for one in shown
    ]
    header = ["adapter", "group", "its own size", "relative error", "squeezed alone"]
    print_table(header, "<>>>>", rows)
    if len(shown) < len(result.adapters):
        say(f"  and {len(result.adapters) - len(shown)} more; -v lists all")
    if verbose:
        say()
        print_table(
            ["module", "group", "rank", "of", "relative error", "worst"],
            "<>>>>>",
            [
                [
                    printable(one.name),
                    str(one.group),
                    str(one.rank_out),
                    str(one.rank_in),
                    number(one.relative_error),
                    number(max(one.errors.values())),
                ]
                for one in result.modules
            ],
        )
    ranks = [one.rank_out for one in result.modules]
    spread = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{ranks[0]}"
    say(f"bases: {quantity(result.groups, 'group')}, rank {spread}")
    say(f"relative error: {number(result.relative_error)}")
    say(f"each squeezed alone to the same size: at least {number(result.alone_error)}")
    say(f"size: {sizes(result.bytes_in, result.bytes_out)}")
