"""`loratools fleet dedup`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.measured import optional
from loratools.cli.output import note, number, print_table, quantity, say
from loratools.cli.perform import report
from loratools.face.fleet_index import FleetDedupResult, fleet_dedup
from loratools.operations.index.searching import DedupOptions
from loratools.work.requests import Reporting
from loratools_formats.disk.errors import printable


@named_command("fleet dedup")
@click.argument("index", type=shared.PATH)
@shared.takes(DedupOptions, into="options")
@shared.reports()
def command(index: Path, options: DedupOptions, reporting: Reporting) -> int:
    """Find near-duplicates among the adapters of an index, and groups with the same start.

    Sketches choose the candidates. Those that have not changed since they were indexed are compared
    exactly.

    \b
    loratools fleet index 'adapters/*' -o index.safetensors
    loratools fleet dedup index.safetensors
    """  # noqa: D301 - click reads the backspace
    result = fleet_dedup(index, options=options)
    report(result, _show, reporting)
    if result.unverified and not reporting.quiet:
        count = quantity(len(result.unverified), "adapter")
        note(f"{count} of the index gone or changed; make it again with `fleet index --update`")
    return 0


def _show(result: FleetDedupResult) -> None:
    if result.pairs:
        print_table(
            ["adapter", "near-duplicate", "cosine", "estimate", "norms"],
            "<<>>>",
            [
                [
                    printable(one.first),
                    printable(one.second),
                    optional(one.cosine, ".6f"),
                    f"{one.estimate:.3f}",
                    number(one.norm_ratio),
                ]
                for one in result.pairs
            ],
        )
    for title, groups in (
        ("copies of one", result.groups),
        ("the same A", result.same_a),
        ("the same start", result.same_start),
    ):
        for group in groups:
            say(f"{title}: {', '.join(printable(path) for path in group)}")
    say(f"{quantity(result.adapters, 'adapter')}, {quantity(len(result.pairs), 'near-duplicate')}")
