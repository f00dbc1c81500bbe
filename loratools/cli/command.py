"""What commands share: help with options under headings, and references to the Hub."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loratools.cli.failure import remember
from loratools.cli.options import DeclaredOption
from loratools.cli.other_names import MISSING, other_option
from loratools.cli.references import weighted_path
from loratools.cli.wording import FLAGS, read_on, worded
from loratools.hub.client import SHOW_PROGRESS
from loratools.hub.references import REVISION_HELP, Want, with_revision
from loratools.work.declared import HEADINGS, Option
from loratools.work.memory import keep_memory

_INPUTS: dict[str, Want] = {
    "adapter": "adapter",
    "adapters": "adapter",
    "base": "model",
    "tuned": "model",
    "fused": "model",
    "made_from": "adapter",
}
"""Arguments that take references to the Hub."""

_REVISION = Option(
    field="revision",
    name="revision",
    type=str,
    default=None,
    help=REVISION_HELP,
    choices=(),
    multiple=False,
    heading="Input",
    short=None,
    aliases=(),
    metavar=None,
    parse=None,
)


class Command(click.Command):
    """A command whose help groups its options, and whose inputs may be on the Hub."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._inputs = [one for one in self.params if one.name in _INPUTS]
        self._inputs = [one for one in self._inputs if isinstance(one, click.Argument)]
        if self._inputs:
            FLAGS["revision"] = _REVISION.flag
            help_text, flag = _REVISION.help, _REVISION.flag
            self.params.append(DeclaredOption(_REVISION, ["revision", flag], help=help_text))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; tell the name of an unknown option, and how to get a missing one."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            known = [flag for one in self.params for flag in one.opts]
            told = other_option(error.option_name, str(self.name), known, self._usage(ctx))
            if told is None:
                raise
            raise click.UsageError(f"No such option '{error.option_name}'. {told}", ctx) from error
        except click.MissingParameter as error:
            name = None if error.param is None else error.param.name
            if name not in MISSING:
                raise
            text = f"{error.format_message().rstrip('.')}. {MISSING[name]}"
            raise click.UsageError(text, ctx) from error

    def _usage(self, ctx: click.Context) -> str:
        """Return the command with its arguments, as they are to be typed."""
        return " ".join([ctx.command_path, *self.collect_usage_pieces(ctx)[1:]])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, with the revision put to its reference."""
        keep_memory()
        remember(ctx)
        revision = ctx.params.pop("revision", None) if self._inputs else None
        if revision is not None:
            self._revise(ctx.params, revision)
        is_shown = sys.stderr is not None and sys.stderr.isatty() and not ctx.params.get("quiet")
        before = SHOW_PROGRESS.set(is_shown)
        try:
            return super().invoke(ctx)
        finally:
            SHOW_PROGRESS.reset(before)

    def _revise(self, given: dict[str, Any], revision: str) -> None:
        """Put the revision to the one reference among the arguments that has none."""
        names = [str(one.name) for one in self._inputs]
        texts = [text for name in names for text in _several(given[name])]
        want: Want = "model" if any(_INPUTS[name] == "model" for name in names) else "adapter"
        pairs = [weighted_path(text) if isinstance(text, str) else (text, None) for text in texts]
        revised = iter(with_revision([path for path, _ in pairs], revision, want))
        changed = [
            text if new == path else _again(new, weight)
            for text, (path, weight), new in zip(texts, pairs, revised, strict=True)
        ]
        for name in names:
            count = len(_several(given[name]))
            made, changed = tuple(changed[:count]), changed[count:]
            given[name] = made if isinstance(given[name], tuple) else made[0]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings; `--help` comes last."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                usual = "Help" if "--help" in parameter.opts else "Input"
                heading = parameter.heading if isinstance(parameter, DeclaredOption) else usual
                groups.setdefault(heading, []).append((record[0], worded(record[1])))
        for heading in (*HEADINGS, "Help"):
            if heading in groups:
                with formatter.section(heading):
                    formatter.write_dl(groups[heading])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write where to read on."""
        formatter.write_paragraph()
        page = (self.name or "").replace(" ", "-")
        formatter.write(read_on(f"commands/{page}.md"))


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _again(path: str, weight: float | None) -> str | Path:
    """Return an argument as it would be given for another path."""
    if weight is None:
        return Path(path)
    return path if weight == 1.0 else f"{path}:{weight!r}"


def command(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function the command `name`; its page is `docs/commands/{name}.md`, with hyphens."""
    return click.command(name, cls=Command)
