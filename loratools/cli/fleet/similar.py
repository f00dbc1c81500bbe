"""`loratools fleet similar`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.measured import optional
from loratools.cli.output import note, print_table, quantity
from loratools.cli.perform import report
from loratools.face.fleet_index import FleetSimilarResult, fleet_similar
from loratools.operations.index.searching import SearchOptions
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting
from loratools_formats.disk.errors import printable


@named_command("fleet similar")
@shared.adapter_argument
@click.option("--index", type=shared.PATH, required=True, help="A file that `fleet index` made.")
@shared.takes(SearchOptions, into="options")
@shared.takes(Workers, into="threads")
@shared.reads("from_", "ignore_key")
@shared.reports()
def command(
    adapter: Path,
    index: Path,
    options: SearchOptions,
    threads: Workers,
    reading: Reading,
    reporting: Reporting,
) -> int:
    """Find the adapters of an index that are nearest to one, by the cosine of their ΔW.

    Sketches choose the candidates. The exact cosines of those that have not changed since they were
    indexed decide the order.

    \b
    loratools fleet similar my-adapter --index index.safetensors
    """  # noqa: D301 - click reads the backspace
    result = fleet_similar(adapter, index, options=options, threads=threads, reading=reading)
    report(result, _show, reporting)
    if result.unverified and not reporting.quiet:
        count = quantity(len(result.unverified), "adapter")
        note(f"{count} of the index gone or changed; make it again with `fleet index --update`")
    return 0


def _show(result: FleetSimilarResult) -> None:
    print_table(
        ["adapter", "cosine", "estimate", "cosine of A"],
        "<>>>",
        [
            [
                printable(one.path),
                optional(one.cosine, ".4f"),
                f"{one.estimate:.3f} ± {2.0 * one.standard_error:.3f}",
                "same" if one.same_a else optional(one.a_estimate, ".3f"),
            ]
            for one in result.neighbours
        ],
    )
