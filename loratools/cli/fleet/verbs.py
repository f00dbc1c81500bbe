"""`loratools fleet VERB`: the commands of one adapter, over all of them.

What stands before `--` is the fleet's, what stands behind it the operation's own: the same flags
that its command has, made from the same declarations.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import click
from click.core import ParameterSource

from loratools.cli import options as shared
from loratools.cli.command import Command
from loratools.cli.completion import path_completions
from loratools.cli.exits import EXIT_FOUND
from loratools.cli.fleet.report import show, tell_failures, telling
from loratools.cli.output import note
from loratools.cli.perform import report
from loratools.cli.wording import read_on
from loratools.face.ran import asked_of
from loratools.pipeline.fleet.run import Fleeting, plan
from loratools.pipeline.fleet.verbs import VERBS, Verb
from loratools.work.declared import Option, declared
from loratools.work.requests import Reading, Reporting

_DASHES = "--"


class FleetCommand(Command):
    """A command that keeps what stands behind `--` for the operation."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the fleet's own arguments; the others are in `ctx.obj`."""
        cut = args.index(_DASHES) if _DASHES in args else len(args)
        ctx.obj = args[cut + 1 :]
        try:
            return super().parse_args(ctx, args[:cut])
        except click.UsageError as told:
            error = told if isinstance(told, click.NoSuchOption) else told.__cause__
            verb = str(self.name).removeprefix("fleet ")
            flags = {made.flag for _, made in VERBS[verb].options.values()}
            if not isinstance(error, click.NoSuchOption) or error.option_name not in flags:
                raise
            at = next(i for i, one in enumerate(args) if one.startswith(error.option_name))
            given = [one for one in args[at + 1 : cut][:1] if not one.startswith("-")]
            moved = shlex.join([args[at], *given, *args[cut + 1 :]])
            before = [*args[:at], *args[at + 1 + len(given) : cut]]
            before = ["-o" if one == "--out-dir" else one for one in before]
            before += [] if {"-o", "--output"} & {*before} else ["-o", "RESULTS"]
            text = (
                f"{error.option_name} is an option of the operation, and those stand behind --: "
                f"loratools fleet {verb} {shlex.join(before)} -- {moved}"
            )
            raise click.UsageError(text, ctx) from error

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write where the operation's options are, and where to read on."""
        formatter.write_paragraph()
        verb = str(self.name).removeprefix("fleet ")
        formatter.write_text(f"Options behind -- are those of `loratools {verb} --help`.")
        formatter.write_paragraph()
        formatter.write(read_on("commands/fleet.md"))


def settings_of(verb: Verb, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the operation's inputs and options by keyword, as its own command reads them.

    Raises:
        click.UsageError: there is no such option, or a value is none.
    """
    by_name: dict[str, str] = {}
    parameters: list[click.Parameter] = []
    for keyword, made in [
        *_inputs(verb),
        *((word, one) for word, (_, one) in verb.options.items()),
    ]:
        option = shared.option_of(made)
        by_name[str(option.name)] = keyword
        parameters.append(option)
    inner = click.Command(
        verb.name, params=parameters, add_help_option=False, context_settings={"obj": None}
    )
    context = inner.make_context(f"loratools {verb.name}", list(arguments))
    return {
        by_name[name]: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }


def _inputs(verb: Verb) -> list[tuple[str, Option]]:
    """Return the operation's further inputs as options: the base, the initial adapter, adapters."""
    known = {made.name: made for made in declared(Reading, "base", "initial")}
    adapter = replace(
        known["initial"], field="adapters", name="adapter", help="Adapter that was fused in."
    )
    return [(name, adapter if name == "adapters" else known[name]) for name in verb.inputs]


def _command(verb: Verb) -> click.Command:
    @click.command(f"fleet {verb.name}", cls=FleetCommand)
    @click.argument(
        "members", nargs=-1, required=True, metavar="ADAPTERS...", shell_complete=path_completions
    )
    @shared.takes(Fleeting, into="how")
    @shared.reports("json", "quiet", "verbose")
    @click.pass_obj
    def command(
        behind: Sequence[str], members: tuple[str, ...], how: Fleeting, reporting: Reporting
    ) -> int:
        settings = settings_of(verb, behind)
        planned = plan(verb.name, members, settings, how)
        with telling(verb.name, len(planned.tasks), quiet=reporting.quiet) as tell:
            result = planned.run(tell)
        given = {"verb": verb.name, "sources": members, "settings": settings or None}
        result.record(asked_of(given, (how,), frozenset({"sources"})), result.seconds)
        report(result, lambda found: show(found, verbose=reporting.verbose), reporting)
        tell_failures(result)
        if not reporting.quiet and result.output is not None and not result.dry_run:
            is_here = how.output is not None and how.output.exists()
            note(f"results are in {how.output if is_here else result.output}")
        return 0 if result.passed else EXIT_FOUND

    behind = _EXAMPLES.get(verb.name, "")
    command.help = (
        f"Run `loratools {verb.name}` over many adapters, and skip finished ones.\n\n"
        "ADAPTERS are paths, wildcards, folders that hold adapters, files that list them (.txt),\n"
        "or hf://organisation/*. Exits with 1 if an adapter failed or a check found something.\n\n"
        f"\b\nloratools fleet {verb.name} 'adapters/*' -o results{behind}\n"
        f"loratools fleet {verb.name} list.txt -o results --shard 3/8{behind}\n"
    )
    return command


_EXAMPLES = {
    "squeeze": " -- --rank 16",
    "convert": " -- --to kohya",
    "fuse": " -- --base base-model",
    "extract": " -- --base base-model --rank 16",
    "to-dora": " -- --base base-model",
    "to-lora": " -- --rank 16",
    "repair": " -- --base base-model",
    "verify": " -- --base base-model --adapter my-adapter",
}


@cache
def __getattr__(name: str) -> click.Command:
    """Return the command of an operation, by its function's name."""
    verb = VERBS.get(name.replace("_", "-"))
    if verb is None:
        raise AttributeError(name)
    return _command(verb)
