"""A group of commands that are imported when they are called, not when they are listed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click

from loratools.cli.other_names import COMMANDS
from loratools.cli.wording import read_on


class LazyGroup(click.Group):
    """A group whose help imports none of its commands.

    Args:
        places: by the name of each command, the module whose `command` it is; `MODULE:NAME` for
            another attribute of the module.
        summaries: by the same names, one sentence for help.
        page: of the documentation, where help says to read on.
        settings: as for `click.Group`.
    """

    def __init__(
        self,
        *args: Any,
        places: Mapping[str, str],
        summaries: Mapping[str, str],
        page: str = "index.md",
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self._places, self._summaries, self._page = places, summaries, page

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, sorted."""
        return sorted(self._places)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names; suggest a close one if none fits."""
        if args[0] not in self._places and not args[0].startswith("-"):
            import difflib

            if os.path.lexists(args[0]):
                ctx.fail(f"{args[0]!r} is a path. {self._with_command(ctx, args)}")
            meant = COMMANDS.get(args[0])
            if args[0] == "help":
                meant = f"{args[1]} --help" if args[1:2] and args[1] in self._places else "--help"
            elif meant not in self._places and meant != "--version":
                meant = next(iter(difflib.get_close_matches(args[0], self._places, n=1)), None)
            hint = f" Did you mean '{meant}'?" if meant else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def _with_command(self, ctx: click.Context, args: list[str]) -> str:
        """Return how to write arguments that begin with a path."""
        given = [word for word in args if word in self._places]
        command = given[0] if given else "info"
        others = [word for word in args if word not in given[:1]] if given else args[:1]
        line = shlex.join([*ctx.command_path.split(), command, *others])
        return f"The command comes first{'' if given else ', such as'}: {line}"

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command; None if no command has the name."""
        if cmd_name not in self._places:
            return None
        module, _, attribute = self._places[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute or "command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from their summaries, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self._summaries.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write where to read on."""
        formatter.write_paragraph()
        formatter.write_text(f"Options of a command: {ctx.command_path} COMMAND --help")
        formatter.write_paragraph()
        formatter.write(read_on(self._page))
