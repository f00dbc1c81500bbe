"""`loratools fleet index`."""

from __future__ import annotations

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.completion import path_completions
from loratools.cli.exits import EXIT_FOUND
from loratools.cli.output import human_bytes, number, quantity, say
from loratools.cli.perform import perform, target_of
from loratools.face.fleet_index import FleetIndexResult, IndexOptions, fleet_index
from loratools.pipeline.fleet.sources import sources
from loratools.work.parallel import Workers
from loratools.work.requests import Reading, Reporting, Writing


@named_command("fleet index")
@click.argument("adapters", nargs=-1, required=True, shell_complete=path_completions)
@shared.takes(IndexOptions, into="options")
@shared.takes(Workers, into="threads")
@shared.reads("from_", "ignore_key")
@shared.writes(positional=False)
@shared.reports()
def command(
    adapters: tuple[str, ...],
    options: IndexOptions,
    threads: Workers,
    reading: Reading,
    writing: Writing,
    reporting: Reporting,
) -> int:
    """Index adapters by sketches of their ΔW, for `fleet similar` and `fleet dedup`.

    ADAPTERS are paths, wildcards, folders that hold adapters, files that list them (.txt), or
    hf://organisation/*. If some cannot be read, they are listed, and the exit code is 1.

    \b
    loratools fleet index 'adapters/*' -o index.safetensors
    loratools fleet index 'adapters/*' -o index.safetensors --update
    """  # noqa: D301 - click reads the backspace
    target = target_of(writing)
    given = sources(adapters)
    failed = 0

    def show(result: FleetIndexResult) -> None:
        say(f"{quantity(result.adapters, 'adapter')}: {result.added} read, {result.kept} kept")
        say(f"standard error of a cosine near 0: {number(result.standard_error)}")
        say(f"size: {human_bytes(result.bytes_out)}")

    def work(progress: object) -> FleetIndexResult:
        nonlocal failed
        result = fleet_index(
            given,
            options=options,
            threads=threads,
            reading=reading,
            writing=target,
            progress=progress,
        )
        failed = len(result.failed)
        for one in result.failed:
            say(f"failed: {one.path}: {one.reason.removeprefix(f'{one.path}: ')}", err=True)
        return result

    code = perform("fleet index", work, show, target, reporting, unit="adapter")
    return EXIT_FOUND if failed else code
