"""How a command shows its help: options under headings, examples, and where to read on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loratools.cli.options import DeclaredOption
from loratools.cli.wording import worded
from loratools.work.declared import HEADINGS


class Command(click.Command):
    """A command whose help groups its options.

    Args:
        section: the part of the README that tells more.
        settings: of click's command.
    """

    def __init__(self, *args: Any, section: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.section = section

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings; those that only click knows come last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                heading = parameter.heading if isinstance(parameter, DeclaredOption) else "Help"
                groups.setdefault(heading, []).append((record[0], worded(record[1])))
        for heading in (*HEADINGS, "Help"):
            if heading in groups:
                with formatter.section(heading):
                    formatter.write_dl(groups[heading])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write where to read on."""
        formatter.write_paragraph()
        formatter.write_text(f"Learn more: “{self.section}” in README.md")


def command(name: str, section: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command.

    Args:
        name: of the command.
        section: the heading in the README, if it is not the command's name.
    """
    return click.command(name, cls=Command, section=section or name)
