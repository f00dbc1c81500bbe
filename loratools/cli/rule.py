"""`loratools rule`."""

from __future__ import annotations

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.perform import report
from loratools.face.check import RuleResult, rule
from loratools.work.requests import Reporting


@named_command("rule")
@click.argument("name", metavar="RULE")
@shared.reports()
def command(name: str, reporting: Reporting) -> None:
    """Explain a rule of `check`: what it finds, why that matters, what to do.

    \b
    loratools rule LT401
    loratools rule not-targeted
    """  # noqa: D301 - click reads the backspace
    report(rule(name), _show, reporting)


def _show(found: RuleResult) -> None:
    click.echo(f"{found.code} {found.rule} ({found.severity})")
    click.echo(f"\n{found.summary} {found.why}\n")
    click.echo(f"fix     {found.fix}")
    click.echo(f"source  {found.source}")
    if found.statistical:
        click.echo("kind    a statistic: it may be wrong about one adapter")
