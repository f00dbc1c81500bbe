"""`loratools push`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.errors import describe
from loratools.cli.exits import EXIT_FOUND, EXIT_UNCHECKED
from loratools.cli.failure import failure
from loratools.cli.output import human_bytes, note, print_json, print_table, say
from loratools.cli.perform import report
from loratools.cli.progress import progress_bar
from loratools.face.check import CheckResult
from loratools.face.push import PushResult, push
from loratools.hub.options import PushOptions
from loratools.operations.check.options import CheckOptions
from loratools.work.parallel import Workers
from loratools.work.requests import Reporting, Writing
from loratools_formats.disk.errors import UnfitError


@named_command("push")
@click.argument("adapter", type=shared.PATH, metavar="PATH")
@click.argument("repo", metavar="USER/NAME")
@shared.takes(PushOptions, into="options")
@shared.takes(CheckOptions, "target", into="checking")
@shared.takes(Writing, "dry_run", into="writing")
@shared.takes(Workers, into="threads")
@shared.reports()
def command(
    adapter: Path,
    repo: str,
    options: PushOptions,
    checking: CheckOptions,
    writing: Writing,
    threads: Workers,
    reporting: Reporting,
) -> int:
    """Publish an adapter or a model on the Hub, checked, with a card, in one commit.

    Only files that loratools knows are published. Between two marks, the card says how the adapter
    was made and how to use it; the author's own text is kept byte for byte. Exits with 1 if the
    check found something of the severity of --fail-on (errors by default), and with 3 if the
    adapter could not be checked.

    \b
    loratools push my-adapter me/my-adapter --private
    loratools push my-adapter me/my-adapter --dry-run
    loratools push my-adapter team/adapter --create-pr
    """  # noqa: D301 - click reads the backspace
    try:
        with progress_bar("check", quiet=reporting.quiet, unit="adapter") as progress:
            result = push(
                adapter,
                repo,
                options=options,
                checking=checking,
                writing=writing,
                threads=threads,
                progress=progress,
            )
    except UnfitError as error:
        found = cast("CheckResult", error.result)
        code = EXIT_UNCHECKED if found.unchecked else EXIT_FOUND
        if not reporting.quiet:
            from loratools.cli.findings.text import text_of

            say(text_of(found), err=reporting.json)
        say("nothing was published; to publish all the same, pass --no-check", err=True)
        if reporting.json:
            print_json(failure(error, describe(error), code))
        return code
    report(result, _show, reporting)
    if not reporting.quiet:
        note(_what_became(result))
    return 0


def _show(result: PushResult) -> None:
    print_table(
        ["file", "size", "in the repository"],
        "<><",
        [[each.path, human_bytes(each.nbytes), each.change] for each in result.files],
    )
    if result.dry_run and result.card_diff:
        say(result.card_diff.rstrip("\n"))
    if result.url is not None:
        say(result.pull_request or result.url)


def _what_became(result: PushResult) -> str:
    if result.dry_run:
        return "dry run, nothing was published"
    if not result.changed:
        return "the repository holds all of it already; no commit was made"
    made = "made the repository, and " if result.created else ""
    return f"{made}published commit {result.commit}"
