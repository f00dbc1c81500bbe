"""Click options made from the declarations of the library: no option is spelled here."""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from loratools.cli.wording import FLAGS
from loratools.hub.references import path_of
from loratools.work.declared import Option, build, declared
from loratools.work.requests import Reading, Reporting, Writing
from loratools_formats.disk.errors import OptionError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Path(click.Path):
    """A path that is not empty: an unset variable of a shell is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("is empty", param, ctx)
        text = os.fsdecode(value)
        meant = os.path.expanduser(text)
        if meant != text and not os.path.lexists(text):
            written = shlex.quote(meant)
            self.fail(f"the shell left ~ as it is in {text}. Write {written}", param, ctx)
        return path_of(os.fsdecode(super().convert(value, param, ctx)))


PATH = _Path()

adapter_argument = click.argument("adapter", type=PATH)
base_argument = click.argument("base", type=PATH)


class _Text(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.2
    """Text that the declaration reads; help shows the choices, and takes their other spellings."""

    def __init__(self, option: Option) -> None:
        self.name = "|".join(option.choices) or "text"
        self._option = option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the text, and leave the reading to `build`."""
        return self._option.one(value) if self._option.choices else value

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str | None:
        """Return the choices in brackets."""
        return f"[{self.name}]" if self._option.choices else None


class DeclaredOption(click.Option):
    """A click option of a declared one: it has a heading, and old flags that help does not show."""

    def __init__(self, option: Option, flags: list[str], **settings: Any) -> None:
        super().__init__(flags, **settings)
        self.heading = option.heading
        self._aliases = option.aliases

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the flags and the text that help shows."""
        shown = self.opts
        self.opts = [flag for flag in shown if flag not in self._aliases]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = shown


def takes(cls: type, *names: str, into: str, without: tuple[str, ...] = ()) -> Decorator:
    """Add the options that a dataclass declares; the command gets the dataclass as `into`.

    Args:
        cls: the dataclass.
        names: which of its options; all by default.
        into: the command's parameter.
        without: old flags that mean something else in this command.
    """
    options = declared(cls, *names)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command_with(*args: Any, **kwargs: Any) -> Any:
            given = {option.name: kwargs.pop(option.name) for option in options}
            return function(*args, **{into: build(cls, given)}, **kwargs)

        command: Callable[..., Any] = command_with
        for option in reversed(options):
            command = _added(option, without)(command)
        return command

    return decorate


def option_of(option: Option, without: tuple[str, ...] = ()) -> DeclaredOption:
    """Return the click option of a declared one, without some of its old flags."""
    flags = [option.name, option.flag, *(flag for flag in option.aliases if flag not in without)]
    flags += [] if option.short is None else [option.short]
    text = f"{option.help} Repeatable." if option.multiple else option.help
    settings: dict[str, Any] = {"help": text, "multiple": option.multiple}
    if option.type is bool:
        settings["is_flag"] = True
        if option.default is True:
            flags[1] += f"/--no-{option.flag[2:]}"
    else:
        plain = {int: click.INT, float: click.FLOAT, Path: PATH}
        is_read = option.parse is not None or option.choices
        settings["type"] = _Text(option) if is_read else plain.get(option.type, click.STRING)
        settings["metavar"] = option.metavar
    if option.default not in (None, ()) and option.default is not False:
        settings |= {"default": option.default, "show_default": True}
    FLAGS[option.keyword] = option.flag
    settings["shell_complete"] = _completer(option)
    return DeclaredOption(option, flags, **settings)


def _added(option: Option, without: tuple[str, ...]) -> Decorator:
    made = option_of(option, without)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__dict__.setdefault("__click_params__", []).append(made)
        return function

    return decorate


def _completer(option: Option) -> Callable[..., Any] | None:
    """Return what completes an option in a shell; None for paths, which click completes."""
    if option.type is bool or (option.type is Path and not option.choices):
        return None

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        from loratools.cli.completion import completions

        return completions(option, incomplete, ctx.command.name)

    return complete


def reads(*names: str) -> Decorator:
    """Add options of reading; the command gets them as `reading`."""
    return takes(Reading, *names, into="reading")


def reports(*names: str) -> Decorator:
    """Add options of printing; the command gets them as `reporting`."""
    return takes(Reporting, *(names or ("json", "quiet")), into="reporting")


def placed(writing: Writing, adapter: Path | None, places: Sequence[Path]) -> Writing:
    """Return a request with the one output that is named, by flag, by place or as the input.

    Raises:
        OptionError: they name several.
    """
    outputs = [*places, *([] if writing.output is None else [writing.output])]
    if writing.in_place and adapter is not None:
        outputs.append(adapter)
        writing = replace(writing, overwrite=True)
    if len(set(outputs)) > 1:
        raise OptionError("several outputs are given", got=", ".join(map(str, outputs)))
    return replace(writing, output=outputs[0] if outputs else None)


def writes(*names: str, positional: bool = True) -> Decorator:
    """Add options of writing; the command gets them as `writing`.

    Args:
        names: others than `--output`, `--overwrite` and `--dry-run`.
        positional: whether the last argument may name the output, too.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(*args: Any, writing: Writing, place: Path | None = None, **kwargs: Any) -> Any:
            places = [] if place is None else [place]
            chosen = placed(writing, kwargs.get("adapter"), places)
            return function(*args, writing=chosen, **kwargs)

        options = takes(Writing, "output", "overwrite", "dry_run", *names, into="writing")(command)
        if not positional:
            return options
        place = click.argument("place", type=PATH, required=False, metavar="[OUTPUT]")
        return place(options)

    return decorate
