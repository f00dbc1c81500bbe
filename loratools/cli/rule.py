"""`loratools rule`."""

from __future__ import annotations

import click

from loratools.cli import options as shared
from loratools.cli.command import command as named_command
from loratools.cli.completion import rule_completions
from loratools.cli.output import say
from loratools.cli.perform import report
from loratools.cli.table import wrapped
from loratools.face.check import RuleResult, rule
from loratools.work.requests import Reporting


@named_command("rule")
@click.argument("name", metavar="RULE", shell_complete=rule_completions)
@shared.reports()
def command(name: str, reporting: Reporting) -> None:
    """Explain a rule of `check`.

    It says what the rule finds, why that matters and what to do.

    \b
    loratools rule LT401
    loratools rule not-targeted
    """  # noqa: D301 - click reads the backspace
    report(rule(name), _show, reporting)


def _show(found: RuleResult) -> None:
    say(f"{found.code} {found.rule} ({found.severity})")
    say()
    say(wrapped(f"{found.summary} {found.why}"))
    say()
    say(wrapped(f"fix     {found.fix}", " " * 8))
    say(wrapped(f"source  {found.source}", " " * 8))
    if found.statistical:
        say("kind    a statistic: it may be wrong about one adapter")
