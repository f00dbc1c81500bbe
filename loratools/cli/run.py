"""`loratools run`."""

from __future__ import annotations

from pathlib import Path

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.exits import EXIT_FOUND
from loratools.cli.output import human_bytes, note, number, print_table
from loratools.cli.perform import report
from loratools.cli.progress import progress_bar
from loratools.pipeline.run import Running, RunResult, run
from loratools.work.parallel import Workers
from loratools.work.requests import Reporting


@named_command("run")
@click.argument("recipe", type=shared.PATH)
@shared.takes(Running, into="how")
@shared.takes(Workers, into="threads")
@shared.reports()
def command(recipe: Path, how: Running, threads: Workers, reporting: Reporting) -> int:
    """Run a recipe: operations one after another, resumed where a run stopped.

    The whole recipe is checked before the first step. Exits with 1 if a check found something.

    \b
    loratools run release.yaml --dry-run
    loratools run release.yaml --set rank=32 -o results
    """  # noqa: D301 - click reads the backspace
    with progress_bar("run", quiet=reporting.quiet, unit="step") as progress:
        found = run(recipe, options=how, threads=threads, progress=progress)
    report(found, _show, reporting)
    if not reporting.quiet:
        note("dry run, nothing was written" if found.dry_run else f"results are in {found.folder}")
    return 0 if found.passed else EXIT_FOUND


def _show(found: RunResult) -> None:
    print_table(
        ["step", "operation", "state", "result", "size", "relative error"],
        "<<<<>>",
        [
            [
                step.name,
                step.operation,
                step.state,
                "–" if step.output is None else step.output.name,
                "–" if step.bytes is None else human_bytes(step.bytes),
                "–" if step.relative_error is None else number(step.relative_error),
            ]
            for step in found.steps
        ],
    )
